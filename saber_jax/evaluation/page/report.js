"use strict";
// The browser of examples: filters, a list, and the clip that is selected in it.

const data = JSON.parse(document.getElementById("examples").textContent);
const find = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Words with the blanks behind them, and single Chinese characters.
const pieces = (text) => text.match(/[\u3400-\u9fff]\s*|[^\s\u3400-\u9fff]+\s*/g) || [];

// `text` against `truth`: <ins> for what only `text` says, <del> for what only the truth says.
function compared(truth, text) {
  const a = pieces(truth), b = pieces(text);
  const same = (i, j) => a[i].trimEnd() === b[j].trimEnd();
  const common = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      common[i][j] = same(i, j) ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
  const runs = [];
  const add = (kind, piece) => {
    const last = runs[runs.length - 1];
    if (last && last.kind === kind) last.text += piece;
    else runs.push({ kind, text: piece });
  };
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && same(i, j)) add("", b[j++]), i++;
    else if (j < b.length && (i === a.length || common[i][j + 1] > common[i + 1][j])) add("ins", b[j++]);
    else add("del", a[i++]);
  }
  return runs.map(({ kind, text }) => (kind ? element(kind, { textContent: text }) : text));
}

const mark = (right) =>
  element("span", { className: right ? "good" : "bad" }, right ? " ✓ correct" : " ✗ incorrect");

function verdicts(item) {
  const labels = Object.entries(item.labels).filter(([name]) => name !== "emotion");
  const truth = element("div", { className: "verdict" }, "Truth: ",
    element("strong", {}, item.labels.emotion),
    element("span", { className: "soft" }, labels.map(([name, value]) => `, ${name} ${value}`).join("")));
  return [truth, ...item.answers.map((answer, i) => {
    const follows = answer.follows.length ? `, follows the ${answer.follows.join(" and the ")}` : "";
    const verdict = mark(answer.right);
    verdict.append(follows);
    return element("div", { className: "verdict" }, `${data.stages[i]}: `,
      element("strong", {}, answer.word || "no emotion named"), verdict);
  })];
}

function table(columns) {
  // columns: [title, six texts, the six texts to compare with or null]
  const grid = element("div", { className: "fields" });
  grid.style.setProperty("--columns", columns.length);
  grid.append(element("div", { className: "head" }),
    ...columns.map(([title]) => element("div", { className: "head" }, title)));
  data.fields.forEach((field, row) => {
    grid.append(element("div", { className: "name" }, field));
    for (const [title, texts, truth] of columns) {
      const cell = element("div", { className: "text" }, element("span", { className: "who" }, `${title}: `));
      if (texts[row] === null) cell.append(element("span", { className: "bad" }, "section missing"));
      else if (truth) cell.append(...compared(truth[row], texts[row]));
      else cell.append(texts[row]);
      if (texts[row] === "") cell.append(element("span", { className: "soft" }, "(empty)"));
      grid.append(cell);
    }
  });
  return grid;
}

const film = (item) => item.video
  ? element("video", { controls: true, preload: "metadata", playsInline: true, src: item.video, "aria-label": `clip ${item.id}` })
  : element("p", { className: "soft" }, "This clip is not embedded in the page.");

// A pair of answers that the model drew itself names no withheld modality.
const origin = (item) => item.withheld === "unknown" ? "drawn" : `said without ${item.withheld}`;

const tones = { corrected: "good", lost: "bad" };

const views = {
  clips: {
    line: (item) => [item.id, `${item.type}: ${item.tags.join(", ")}`, tones[item.tags[0]]],
    filters: { type: (item) => [item.type], outcome: (item) => item.tags, language: (item) => [item.language] },
    show: (item) => [
      element("div", { className: "clip" }, film(item),
        element("div", {}, element("h3", {}, item.id),
          element("div", { className: "soft" }, `${item.type}, ${item.language}: ${item.tags.join(", ")}`),
          ...verdicts(item))),
      table([["Truth", item.truth, null],
        ...item.answers.map((answer, i) => [data.stages[i], answer.sections, item.truth])]),
    ],
  },
  pairs: {
    line: (item) => [item.id, `${origin(item)}: ${item.words[1] || "no emotion named"}`],
    filters: { type: (item) => [item.type], outcome: (item) => [origin(item)], language: (item) => [item.language] },
    show: (item) => [
      element("div", { className: "clip" }, film(item),
        element("div", {}, element("h3", {}, item.id),
          element("div", { className: "soft" }, `${item.type}, ${item.language}`),
          element("div", { className: "verdict" }, "Chosen concludes ", element("strong", {}, item.words[0] || "nothing")),
          element("div", { className: "verdict" }, `Rejected, ${origin(item)}, concludes `,
            element("strong", {}, item.words[1] || "nothing")))),
      table([["Chosen", item.chosen, null], ["Rejected", item.rejected, item.chosen]]),
    ],
  },
};

let view = "clips", shown = [], selected = 0;

function refill() {
  for (const [name, values] of Object.entries(views[view].filters)) {
    const select = find(`filter-${name}`), kinds = new Set(data[view].flatMap(values));
    select.replaceChildren(element("option", { value: "" }, "all"),
      ...[...kinds].filter(Boolean).sort().map((kind) => element("option", { value: kind }, kind)));
  }
  filter();
}

function filter() {
  const wanted = Object.entries(views[view].filters)
    .map(([name, values]) => [find(`filter-${name}`).value, values])
    .filter(([value]) => value);
  shown = data[view].filter((item) => wanted.every(([value, values]) => values(item).includes(value)));
  find("count").textContent = `${shown.length} of ${data[view].length}`;
  find("list").replaceChildren(...shown.map((item, i) => {
    const [title, note, tone] = views[view].line(item);
    return element("li", { role: "option", id: `item-${i}`, onclick: () => select(i) },
      title, element("small", { className: tone || "" }, note));
  }));
  select(0);
}

function select(index) {
  selected = Math.max(0, Math.min(index, shown.length - 1));
  const list = find("list");
  [...list.children].forEach((node, i) => node.setAttribute("aria-selected", i === selected));
  if (!shown.length) {
    list.removeAttribute("aria-activedescendant");
    find("example").replaceChildren(element("p", {}, "No example fits these filters."));
    return;
  }
  list.setAttribute("aria-activedescendant", `item-${selected}`);
  const node = list.children[selected], top = node.offsetTop - list.offsetTop;
  // Not scrollIntoView: that would move the whole page.
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + node.offsetHeight > list.scrollTop + list.clientHeight)
    list.scrollTop = top + node.offsetHeight - list.clientHeight;
  find("example").replaceChildren(...views[view].show(shown[selected]));
}

const steps = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inList = event.target === find("list");
  const elsewhere = event.target === document.body && "jk".includes(event.key);
  if (!(event.key in steps) || !(inList || elsewhere)) return;
  event.preventDefault();
  select(Math.max(0, Math.min(selected + steps[event.key], shown.length - 1)));
}

function tab(name) {
  view = name;
  for (const node of document.querySelectorAll("[role=tab]")) {
    node.setAttribute("aria-selected", node.dataset.view === name);
    node.tabIndex = node.dataset.view === name ? 0 : -1;
  }
  find("outcome-label").textContent = name === "clips" ? "outcome" : "withheld";
  refill();
}

document.addEventListener("keydown", key);
for (const node of document.querySelectorAll("[role=tab]")) {
  node.onclick = () => tab(node.dataset.view);
  node.onkeydown = (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = [...document.querySelectorAll("[role=tab]")].find((tab) => tab !== node);
    if (other) other.focus(), other.click();
  };
}
for (const node of document.querySelectorAll(".filters select")) node.onchange = filter;
find("differences").onchange = (event) => find("example").classList.toggle("plain", !event.target.checked);
tab("clips");
// Open on a clip that training changed, if there is one, in the page's own language.
const corrected = shown.filter((item) => item.tags[0] === "corrected");
const own = corrected.find((item) => item.language === document.documentElement.lang);
select(shown.indexOf(own || corrected[0]));
