// A column: the settings of one model, and the text that it writes with them.

// Values that change nothing, and need not be told.
const HARMLESS = {top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0};
const SHOWN_PROMPT = 600; // characters of the prompt stand before a text

function cloned(id) {
  return document.getElementById(id).content.firstElementChild.cloneNode(true);
}

function sizesOf({max_model_len: context, vocab_size: size}) {
  return `${context.toLocaleString("en")} tokens of context, a vocabulary of ${size.toLocaleString("en")}`;
}

class Column {
  constructor(number, models) {
    this.models = models;
    this.turns = []; // {prompt, tokens, figures}; a text has one, a chat several
    this.controller = null;
    this.element = cloned("column");
    this.element.setAttribute("aria-label", `Text ${number + 1}`);
    this.part = (selector) => this.element.querySelector(selector);
    this.fields = [...this.element.querySelectorAll("[name]")];
    this.fields.forEach((field) => this.prepare(field, number));
    this.part("[name=model]").append(...models.map(({id}) => new Option(id, id)));
    this.part("[name=model]").selectedIndex = Math.min(number, models.length - 1);
    this.field("seed").value = this.model.settings?.seed ?? 1; // that the same text may be had again
    this.part("[data-for=models]").hidden = models.length < 2;
    this.element.addEventListener("input", () => this.summarise());
    this.summarise();
  }

  prepare(field, number) {
    const box = field.closest(".field");
    const hint = box.querySelector("small");
    field.id = `${field.name}-${number}`;
    if (hint) {
      hint.id = `${field.id}-hint`;
      field.setAttribute("aria-describedby", hint.id);
    }
    box.append(Object.assign(made("small", "fault", ""), {id: `${field.id}-fault`, role: "alert"}));
    field.addEventListener("input", () => this.clearFault(field));
  }

  field(name) {
    return this.fields.find((field) => field.name === name);
  }

  get model() {
    return this.models[this.part("[name=model]").selectedIndex];
  }

  // Shows the server's own settings where nothing is given, and in a line what the text is written with.
  summarise() {
    const defaults = this.model.settings ?? {};
    for (const field of this.fields.filter((field) => field.type === "number")) {
      field.placeholder = defaults[field.name] ?? (field.name === "seed" ? "any" : "off");
    }
    const value = (name) => this.field(name).value || defaults[name];
    this.part("[data-for=models] small").textContent = sizesOf(this.model);
    const told = [
      this.models.length > 1 && this.model.id,
      `temperature ${value("temperature") ?? "as the server has it"}`,
      ...Object.entries(HARMLESS).map(
        ([name, harmless]) => Number(value(name) ?? harmless) !== harmless && `${name.replace("_", " ")} ${value(name)}`,
      ),
      value("max_tokens") && `${value("max_tokens")} tokens`,
      value("seed") != null && `seed ${value("seed")}`,
      this.field("stop").value && "stops at a text",
    ];
    this.part("summary .soft").textContent = told.filter(Boolean).join(" · ");
  }

  nextSeed() {
    const seed = this.field("seed");
    seed.value = (Number(seed.value || this.model.settings?.seed) || 0) + 1;
    this.summarise();
  }

  // The settings that are given; what is left empty is the server's to choose.
  settings() {
    const found = {};
    for (const field of this.fields.filter((field) => field.type === "number")) {
      if (field.validity.badInput) {
        throw new Fault("This is not a number.", field.name);
      }
      if (field.value) {
        found[field.name] = field.valueAsNumber;
      }
    }
    const stop = this.field("stop").value.split("\n").filter(Boolean);
    return {...found, ...(stop.length && {stop: stop.map((text) => text.replaceAll("\\n", "\n"))})};
  }

  layout(isChat) {
    this.isChat = isChat;
    this.part("[data-for=chat]").hidden = !isChat;
    this.part("[data-for=text]").hidden = isChat;
    [...this.field("model").options].forEach((option, n) => (option.disabled = isChat && !this.models[n].has_chat_template));
  }

  request(prompt, before) {
    const {id: model, vocab_size: size} = this.model;
    const n_others = Math.min(5, size ?? 5);
    const body = {model, stream: true, stream_options: {include_usage: true}, ...this.settings()};
    if (!this.isChat) {
      const echo = this.field("echo").checked && {echo: true};
      return ["/v1/completions", {...body, prompt, logprobs: n_others, ...echo}];
    }
    const system = this.field("system").value;
    const messages = before.flatMap((turn) => [
      {role: "user", content: turn.prompt},
      {role: "assistant", content: textOf(turn)},
    ]);
    messages.push({role: "user", content: prompt});
    messages.unshift(...(system ? [{role: "system", content: system}] : []));
    return ["/v1/chat/completions", {...body, messages, logprobs: true, top_logprobs: n_others}];
  }

  // Writes a text, in a chat after the others or, again, for the last; returns the fault, if there was one.
  async write(prompt, again) {
    this.clearFaults();
    this.stop();
    const controller = (this.controller = new AbortController());
    const shown = this.turns;
    const before = this.isChat ? shown.slice(0, again ? -1 : undefined) : [];
    const turn = {prompt, isEchoed: false, tokens: [], figures: {}};
    try {
      const [path, body] = this.request(prompt, before);
      turn.isEchoed = Boolean(body.echo);
      this.turns = [...before, turn];
      this.show();
      await this.receive(streamed(path, body, controller.signal), turn);
    } catch (error) {
      if (!turn.tokens.length && this.turns.at(-1) === turn) {
        this.turns = shown;
        this.show();
      }
      if (error.name !== "AbortError") {
        this.showFault(error);
        return error;
      }
    } finally {
      if (this.controller === controller) {
        this.controller = null;
      }
    }
    return null;
  }

  stop() {
    this.controller?.abort();
    this.controller = null;
  }

  async receive(chunks, turn) {
    const view = this.part(".turns").lastElementChild;
    const speaker = new Speaker(this.part(".spoken"));
    const started = performance.now();
    const n_given = turn.isEchoed ? [...turn.prompt].length : 0; // as the server counts characters
    let frame = null;
    const draw = () => (frame = drawn(view, turn));
    view.classList.add("busy");
    try {
      for await (const {choices, usage} of chunks) {
        const {figures} = turn;
        figures.total = performance.now() - started;
        figures.first ??= figures.total;
        figures.n_tokens = usage?.completion_tokens ?? figures.n_tokens;
        for (const {text, delta, logprobs, finish_reason: end} of choices) {
          for (const {offset, ...token} of tokensOf(text ?? delta?.content ?? "", logprobs)) {
            const given = offset < n_given && {given: true};
            turn.tokens.push({...token, ...given});
            speaker.say(given ? "" : token.text);
          }
          figures.end = end ?? figures.end;
        }
        frame ??= requestAnimationFrame(draw);
      }
    } catch (error) {
      turn.figures.end = error.name === "AbortError" ? "stopped" : "broken off";
      throw error;
    } finally {
      cancelAnimationFrame(frame);
      view.classList.remove("busy");
      draw();
      speaker.end();
    }
  }

  show() {
    this.part(".turns").replaceChildren(...this.turns.map((turn) => this.view(turn)));
  }

  view(turn) {
    const view = cloned("turn");
    const prompt = this.isChat || turn.prompt.length <= SHOWN_PROMPT ? turn.prompt : `…${turn.prompt.slice(-SHOWN_PROMPT)}`;
    view.querySelector(".said").textContent = turn.isEchoed ? "" : prompt;
    view.querySelector(".on").hidden = this.isChat;
    view.querySelector(".on").addEventListener("click", () => this.onGoOn(turn.prompt + textOf(turn)));
    view.querySelector(".copy").hidden = !navigator.clipboard; // browsers lend it to few addresses
    view.querySelector(".copy").addEventListener("click", () => navigator.clipboard.writeText(textOf(turn)));
    drawn(view, turn);
    return view;
  }

  showFault(fault) {
    const name = /^\w*/.exec(fault.field ?? "")[0];
    const field = this.fields.find((field) => field.name === name && !field.closest("[hidden]"));
    if (["prompt", "messages"].includes(name)) {
      this.onPromptFault(fault.message);
      return;
    }
    const place = field ? document.getElementById(`${field.id}-fault`) : this.part(":scope > .fault");
    if (field) {
      field.setAttribute("aria-invalid", "true");
      field.setAttribute("aria-describedby", place.id);
      this.part("details").open = true;
    }
    place.textContent = fault.message;
    place.scrollIntoView({block: "nearest"});
  }

  clearFault(field) {
    const hint = document.getElementById(`${field.id}-hint`);
    document.getElementById(`${field.id}-fault`).textContent = "";
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
    if (hint) {
      field.setAttribute("aria-describedby", hint.id);
    }
  }

  clearFaults() {
    this.part(":scope > .fault").textContent = "";
    this.fields.forEach((field) => this.clearFault(field));
  }

  // What a history keeps, and a second column begins with.
  state() {
    const values = this.fields.map((field) => [field.name, field.type === "checkbox" ? field.checked : field.value]);
    return {model: this.model.id, values: Object.fromEntries(values), turns: this.turns};
  }

  restore({values, turns}) {
    for (const field of this.fields.filter(({name}) => name in values)) {
      field[field.type === "checkbox" ? "checked" : "value"] = values[field.name];
    }
    if (this.field("model").selectedIndex < 0) {
      this.field("model").selectedIndex = 0; // a model that is served no more
    }
    this.turns = turns;
    this.clearFaults();
    this.summarise();
    this.show();
  }
}
