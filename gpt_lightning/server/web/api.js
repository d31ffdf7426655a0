// Speaks with the server; whatever goes wrong is a Fault in plain words, with the field that it is about.

class Fault extends Error {
  constructor(message, field = null) {
    super(message);
    this.field = field;
  }
}

const LOST = "The connection to the server is lost. Is it still running?";

async function ask(path, body = null, signal = null) {
  for (;;) {
    const key = keyRing.key;
    const headers = {...(body && {"content-type": "application/json"}), ...(key && {authorization: `Bearer ${key}`})};
    const options = {method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal};
    const answer = await fetch(path, {...options, cache: "no-store"}).catch((error) => {
      throw error.name === "AbortError" ? error : new Fault(LOST);
    });
    if (answer.status === 401) {
      await keyRing.renew(key);
    } else if (answer.ok) {
      return answer;
    } else {
      throw await faultOf(answer);
    }
  }
}

async function faultOf(answer) {
  const {error} = await answer.json().catch(() => ({}));
  if (typeof error?.message === "string") {
    return new Fault(error.message, error.param ?? null);
  }
  return new Fault(`The server answers ${answer.status} ${answer.statusText} and does not say why.`);
}

// Yields what a stream holds until the server says that it is whole.
async function* streamed(path, body, signal) {
  const answer = await ask(path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const {done, value} = await reader.read();
      const lines = (rest + (value ?? "")).split("\n");
      rest = lines.pop();
      for (const line of lines.filter((line) => line.startsWith("data:"))) {
        const data = line.slice(5).trim();
        if (data === "[DONE]") {
          return;
        }
        const chunk = JSON.parse(data);
        if (chunk.error) {
          throw new Fault(chunk.error.message, chunk.error.param ?? null);
        }
        yield chunk;
      }
      if (done) {
        throw new Fault(LOST);
      }
    }
  } catch (error) {
    throw error instanceof Fault || error.name === "AbortError" ? error : new Fault(LOST);
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Keeps the key until the tab is closed, and asks for it once, however many requests wait for it.
const keyRing = {
  key: sessionStorage.getItem("gpt_lightning.key"),
  asking: null,

  async renew(refused) {
    if (refused === this.key) {
      this.asking ??= this.dialogue(refused !== null).finally(() => (this.asking = null));
      await this.asking;
    }
  },

  dialogue(wasRefused) {
    const dialog = document.getElementById("key");
    const field = document.getElementById("key-field");
    document.getElementById("key-about").textContent =
      (wasRefused ? "It has not taken that one. " : "") + "The page keeps a key until this tab is closed.";
    field.value = "";
    dialog.returnValue = "";
    dialog.showModal();
    return new Promise((found, failed) => {
      dialog.onclose = () => {
        if (dialog.returnValue === "given") {
          this.key = field.value;
          sessionStorage.setItem("gpt_lightning.key", this.key);
          found();
        } else {
          failed(new Fault("The server answers only with a key."));
        }
        field.value = "";
      };
    });
  },
};
document.querySelector("#key form").addEventListener("submit", () => (document.getElementById("key").returnValue = "given"));
document.getElementById("no-key").addEventListener("click", () => document.getElementById("key").close(""));
