// Shows a text token by token, coloured by surprise, and tells of the one that is pointed at or has the focus.

const tip = document.getElementById("tip");

function made(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

// The tokens that a chunk brings, each with what it adds to the text: together they add that and nothing else.
function tokensOf(text, logprobs) {
  const rows = logprobs?.content?.map(fromChat) ?? logprobs?.tokens?.map((_, n) => fromCompletion(logprobs, n)) ?? [];
  if (!rows.length) {
    return text ? [{text, name: text, logprob: null, others: []}] : [];
  }
  let start = 0;
  rows.forEach((row, n) => {
    const end = endOf(text, start, row, rows[n + 1]);
    row.text = text.slice(start, end);
    start = end;
  });
  return rows;
}

// Where a token's part of the text ends. Of a character in several tokens, which match nothing, the last has it.
function endOf(text, start, row, next) {
  if (!next) {
    return text.length;
  }
  if (text.startsWith(row.text, start)) {
    return start + row.text.length;
  }
  const isLast = isPart(row.text) && !isPart(next.text);
  return isLast ? Math.max(start, text.indexOf(next.text, start)) : start;
}

function isPart(token) {
  return token.startsWith("bytes:") || token.includes("�");
}

function fromChat({token, name, logprob, top_logprobs: others}) {
  return row(token, name, logprob, (others ?? []).map((other) => [other.token, other.logprob]));
}

function fromCompletion({tokens, token_names: names, token_logprobs: logprobs, top_logprobs: others, text_offset: offsets}, n) {
  return {...row(tokens[n], names?.[n], logprobs[n], Object.entries(others?.[n] ?? {})), offset: offsets?.[n]};
}

function row(token, name, logprob, others) {
  const own = name ?? plainName(token);
  const named = others.map(([other, value]) => [other === token ? own : plainName(other), value]);
  return {text: token, name: own, logprob: logprob ?? null, others: named.sort((one, other) => other[1] - one[1])};
}

// Of bytes that are no whole character, "bytes:\xe6\x88", only these are known.
function plainName(token) {
  const bytes = /^bytes:((\\x[0-9a-f]{2})+)$/.exec(token)?.[1];
  return bytes ? `�‹${bytes.replaceAll("\\x", "")}›` : token;
}

function bitsOf(token) {
  return token.logprob === null ? 0 : Math.max(0, -token.logprob / Math.LN2);
}

function showToken(box, token) {
  const span = document.createElement("span");
  span.className = token.given ? "prompt" : "";
  span.classList.toggle("part", token.text === "");
  span.tabIndex = box.childElementCount ? -1 : 0; // one stop of the tab key; arrows go on from there
  span.style.setProperty("--bits", bitsOf(token).toFixed(2));
  for (const piece of token.text.split(/(\n|\t)/).filter(Boolean)) {
    span.append(piece === "\n" ? made("span", "line", piece) : piece === "\t" ? made("span", "tab", piece) : piece);
  }
  span.token = token;
  box.append(span);
}

function percent(logprob) {
  const share = 100 * Math.exp(Math.min(0, logprob));
  return share >= 0.001 ? `${Number(share.toPrecision(3))} %` : "under 0.001 %";
}

function quoted(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·");
}

function tell(span) {
  if (span === tip.of) {
    return;
  }
  document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
  tip.of = span;
  tip.classList.toggle("shown", span !== null);
  if (span === null) {
    return;
  }
  const {name, logprob, others} = span.token;
  const unknown = span.token.given ? "begins the text" : "of unknown probability";
  const found = logprob === null ? unknown : `${percent(logprob)}, ${bitsOf(span.token).toFixed(1)} bits`;
  const rows = others.map(([other, value]) => {
    const row = made("i", other === name ? "chosen" : "", "");
    row.style.setProperty("--share", Math.exp(value));
    row.append(made("span", "", quoted(other)), ` ${percent(value)} `);
    return row;
  });
  tip.replaceChildren(made("b", "", quoted(name)), ` ${found} `, ...rows);
  span.setAttribute("aria-describedby", "tip");
  place(span);
}

// Under the token where there is room, else over it; on a narrow screen the style sheet keeps it at the bottom.
function place(span) {
  const token = span.getClientRects()[0] ?? span.getBoundingClientRect(); // of one over two lines the first part
  const {width, height} = tip.getBoundingClientRect();
  const left = Math.min(Math.max(12, token.left - 12), document.documentElement.clientWidth - width - 12);
  const below = token.bottom + 8;
  const top = below + height + 8 < innerHeight ? below : Math.max(8, token.top - height - 8);
  tip.style.setProperty("--left", `${left}px`);
  tip.style.setProperty("--top", `${top}px`);
}

const tokenAt = (node) => (node instanceof Element ? node.closest(".tokens > span") : null);
const focused = () => tokenAt(document.activeElement);
document.addEventListener("pointerover", (event) => tell(tokenAt(event.target) ?? focused()));
document.addEventListener("focusin", (event) => tell(tokenAt(event.target)));
document.addEventListener("focusout", () => tell(null));
document.addEventListener("scroll", () => tip.of && place(tip.of), {passive: true});
document.addEventListener("keydown", (event) => {
  const span = focused();
  const next = {ArrowRight: span?.nextElementSibling, ArrowLeft: span?.previousElementSibling};
  const ends = {Home: span?.parentElement.firstElementChild, End: span?.parentElement.lastElementChild};
  const other = {...next, ...ends}[event.key];
  if (other) {
    event.preventDefault();
    span.tabIndex = -1;
    other.tabIndex = 0;
    other.focus();
  }
});
