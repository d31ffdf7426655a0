// A turn: one prompt, and the tokens that follow it, on the screen and for a screen reader.

const ENDS = {stop: "came to an end", length: "reached the token limit"};

// Shows the tokens that are not seen yet, and goes with them where the end of the page is seen.
function drawn(view, turn) {
  const follows = innerHeight + scrollY >= document.documentElement.scrollHeight - 40;
  const box = view.querySelector(".tokens");
  turn.tokens.slice(box.childElementCount).forEach((token) => showToken(box, token));
  view.querySelector(".told").textContent = figuresOf(turn);
  if (follows && view.isConnected) {
    scrollTo(scrollX, document.documentElement.scrollHeight);
  }
  return null;
}

function textOf({tokens}) {
  return tokens.filter(({given}) => !given).map(({text}) => text).join("");
}

function figuresOf({tokens, figures}) {
  const written = tokens.filter(({given}) => !given);
  const scored = written.filter(({logprob}) => logprob !== null);
  const n = figures.n_tokens ?? written.length;
  const bits = scored.reduce((sum, token) => sum + bitsOf(token), 0) / scored.length;
  const rate = (n - 1) / ((figures.total - figures.first) / 1000);
  const told = [
    `${n.toLocaleString("en")} tokens`,
    n > 1 && Number.isFinite(rate) && `${Number(rate.toPrecision(3)).toLocaleString("en")} a second`,
    scored.length && `${bits.toFixed(2)} bits a token`,
    figures.total !== undefined && (ENDS[figures.end] ?? figures.end),
  ];
  return figures.total === undefined ? "…" : told.filter(Boolean).join(" · ");
}

// Gives a screen reader whole sentences rather than each token.
class Speaker {
  constructor(element) {
    this.element = element;
    this.text = "";
    element.replaceChildren();
  }

  say(text) {
    this.text += text;
    if (/[.!?;:\n。！？；：]\s*$/.test(this.text) || this.text.length > 200) {
      this.end();
    }
  }

  end() {
    if (this.text.trim()) {
      this.element.append(made("p", "", this.text));
    }
    this.text = "";
  }
}
