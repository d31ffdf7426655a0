// Keeps what was written in this browser, the newest first, within bounds.

const MOST_ENTRIES = 50;
const MOST_CHARACTERS = 2_000_000; // browsers give about 5 million to a site
const HISTORY = "gpt_lightning.history";

const past = {
  entries: read(),

  // Adds an entry, or puts it in the place of the one with its id.
  keep(entry) {
    this.entries = [entry, ...this.entries.filter((other) => other.id !== entry.id)];
    this.write();
  },

  drop(id) {
    this.entries = this.entries.filter((entry) => entry.id !== id);
    this.write();
  },

  clear() {
    this.entries = [];
    this.write();
  },

  // Lets the oldest go until the rest fit; where a browser keeps nothing, the page has it until it is closed.
  write() {
    this.entries = this.entries.slice(0, MOST_ENTRIES);
    const sizes = this.entries.map((entry) => JSON.stringify(entry).length);
    for (let total = sizes.reduce((sum, size) => sum + size, 0); total > MOST_CHARACTERS && sizes.length > 1; ) {
      total -= sizes.pop();
    }
    this.entries.length = sizes.length;
    try {
      localStorage.setItem(HISTORY, JSON.stringify(this.entries));
    } catch {
      // No room or no leave.
    }
  },
};

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(HISTORY) ?? "[]");
    return found.filter((entry) => entry.id && Array.isArray(entry.columns) && entry.columns.length);
  } catch {
    return [];
  }
}

function listPast(open) {
  const entries = past.entries.map((entry) => {
    const item = document.getElementById("entry").content.cloneNode(true);
    const what = entry.prompt.trim() || "an empty prompt";
    const when = new Date(entry.time).toLocaleString([], {dateStyle: "medium", timeStyle: "short"});
    item.querySelector(".what").textContent = what.slice(0, 200);
    item.querySelector(".when").textContent = [when, ...new Set(entry.columns.map(({model}) => model))].join(" · ");
    item.querySelector(".open").addEventListener("click", () => open(entry));
    item.querySelector(".drop").setAttribute("aria-label", `Forget “${what.slice(0, 40)}”`);
    item.querySelector(".drop").addEventListener("click", () => {
      past.drop(entry.id);
      listPast(open);
    });
    return item;
  });
  document.getElementById("entries").replaceChildren(...entries);
  document.getElementById("clear").disabled = !entries.length;
  document.getElementById("history-about").textContent = entries.length
    ? `Kept in this browser alone: the last ${MOST_ENTRIES}, or fewer of long ones.`
    : "What the model writes will be kept here, in this browser alone.";
}
