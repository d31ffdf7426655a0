// Puts the page together: what each button and key does.

const byId = (id) => document.getElementById(id);
const prompt = byId("prompt");
let models = [];
let columns = [];
let entryId = null; // of the history, while a chat goes on
let run = 0; // counts what was begun, so that only the last one ends the business

const isChat = () => byId("layout").querySelector(":checked")?.value === "chat";
const isBusy = () => columns.some((column) => column.controller);

async function start() {
  try {
    models = (await (await ask("/v1/models")).json()).data;
  } catch (error) {
    byId("about").textContent = "";
    byId("page-fault").textContent = `${error.message} Load the page again then.`;
    return;
  }
  const names = models.map(({id}) => id).join(" and ");
  document.title = byId("title").textContent = names;
  byId("about").textContent = models.length === 1 ? sizesOf(models[0]) : "Compare shows both side by side.";
  byId("layout").hidden = !models.some((model) => model.has_chat_template);
  setColumns(1);
  setLayout(models[0].has_chat_template);
}

function setColumns(n) {
  columns.slice(n).forEach((column) => column.stop());
  columns = columns.slice(0, n);
  while (columns.length < n) {
    const column = new Column(columns.length, models);
    column.onGoOn = (text) => write((prompt.value = text));
    column.onPromptFault = showPromptFault;
    column.layout(isChat());
    columns.push(column);
  }
  byId("columns").replaceChildren(...columns.map(({element}) => element));
  byId("columns").classList.toggle("two", n === 2);
  byId("compare").setAttribute("aria-pressed", n === 2);
  update();
}

function setLayout(chat) {
  for (const radio of byId("layout").querySelectorAll("input")) {
    radio.checked = radio.value === (chat ? "chat" : "text");
  }
  document.body.classList.toggle("chat", chat);
  byId("prompt-label").textContent = chat ? "Message" : "Prompt";
  byId("prompt-label").classList.toggle("unseen", chat);
  prompt.placeholder = chat ? "Message" : "";
  byId("write").textContent = chat ? "Send" : "Write";
  byId("keys").textContent = chat
    ? "Enter sends, Shift+Enter begins a line, Esc stops"
    : "Ctrl+Enter writes, Esc stops, Alt+Enter writes again";
  prompt.rows = chat ? 1 : 3;
  document.querySelector("main")[chat ? "append" : "prepend"](byId("ask"));
  columns.forEach((column) => column.layout(chat));
  reset();
}

// Begins anew, with the settings as they are.
function reset() {
  entryId = null;
  columns.forEach((column) => {
    column.stop();
    column.turns = [];
    column.clearFaults();
    column.show();
  });
  showPromptFault("");
  update();
}

function update() {
  const hasTurns = columns.some((column) => column.turns.length);
  byId("write").disabled = !columns.length || (isChat() && isBusy());
  byId("stop").disabled = !isBusy();
  byId("again").disabled = !hasTurns || isBusy();
  byId("fresh").hidden = !(isChat() && hasTurns);
  byId("legend").hidden = !hasTurns || document.body.classList.contains("plain");
}

function showPromptFault(message) {
  byId("prompt-fault").textContent = message;
  prompt.toggleAttribute("aria-invalid", Boolean(message));
}

async function write(text, again = false) {
  const own = ++run;
  showPromptFault("");
  const written = columns.map((column) => column.write(text, again));
  prompt.value = isChat() ? "" : text;
  if (isChat()) {
    scrollTo(scrollX, document.documentElement.scrollHeight);
  }
  update();
  const faults = await Promise.all(written);
  if (own !== run) {
    return;
  }
  if (isChat() && !again && faults.every(Boolean)) {
    prompt.value ||= text;
  }
  if (columns.some(({turns}) => turns.at(-1)?.tokens.length)) {
    keep(text);
  }
  update();
}

function writeAgain() {
  columns.forEach((column) => column.nextSeed());
  write(isChat() ? columns[0].turns.at(-1).prompt : prompt.value, true);
}

function stop() {
  columns.forEach((column) => column.stop());
  update();
}

function keep(text) {
  entryId = (isChat() && entryId) || `${Date.now()}-${Math.random()}`;
  const shown = isChat() ? columns[0].turns[0].prompt : text;
  const states = columns.map((column) => column.state());
  past.keep({id: entryId, time: Date.now(), chat: isChat(), prompt: shown, columns: states});
}

function open(entry) {
  byId("history").close();
  setColumns(entry.columns.length);
  setLayout(entry.chat && !byId("layout").hidden);
  prompt.value = isChat() ? "" : entry.prompt;
  columns.forEach((column, n) => column.restore(entry.columns[n]));
  entryId = isChat() ? entry.id : null;
  update();
}

function compare() {
  if (columns.length === 2) {
    return setColumns(1);
  }
  setColumns(2);
  const {values, turns} = structuredClone(columns[0].state());
  delete values.model; // the second model, where there are two
  columns[1].restore({values, turns: isChat() ? turns : []});
  columns[1].layout(isChat());
  return update();
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  write(prompt.value);
});
byId("stop").addEventListener("click", () => {
  stop();
  prompt.focus();
});
byId("again").addEventListener("click", writeAgain);
byId("fresh").addEventListener("click", () => {
  reset();
  prompt.focus();
});
byId("layout").addEventListener("change", () => setLayout(isChat()));
byId("compare").addEventListener("click", compare);
byId("colours").addEventListener("click", () => {
  const plain = document.body.classList.toggle("plain");
  byId("colours").setAttribute("aria-pressed", !plain);
  update();
});
byId("open-history").addEventListener("click", () => {
  listPast(open);
  byId("history").showModal();
});
byId("close-history").addEventListener("click", () => byId("history").close());
byId("clear").addEventListener("click", () => {
  if (confirm(`Forget all ${past.entries.length}?`)) {
    past.clear();
    listPast(open);
  }
});
prompt.addEventListener("input", () => showPromptFault(""));
document.addEventListener("keydown", (event) => {
  const composes = event.isComposing || event.keyCode === 229; // the key belongs to an input method
  if (composes || document.querySelector("dialog[open]")) {
    return;
  }
  const inPrompt = event.target === prompt;
  const sends = event.ctrlKey || event.metaKey || (isChat() && inPrompt && !event.shiftKey && !event.altKey);
  if (event.key === "Escape") {
    tell(null);
    stop();
  } else if (event.key === "Enter" && event.altKey && !byId("again").disabled) {
    event.preventDefault();
    writeAgain();
  } else if (event.key === "Enter" && sends && !byId("write").disabled) {
    event.preventDefault();
    write(prompt.value);
  }
});
start();
