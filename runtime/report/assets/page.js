"use strict";
// Enhances a page that is complete without it: sorting by a click on a heading, search, long tables, links to nodes.
const find = document.getElementById("find"), marked = document.getElementById("marked");
const found = document.getElementById("found"), tables = [...document.querySelectorAll("table")];

function value(row, column) {
  const text = (row.cells[column]?.textContent ?? "").trim();
  const match = text.replaceAll(",", "").match(/-?\d+(\.\d+)?(e[+-]?\d+)?/i);
  if (!match) return [1, text];
  const unit = text.slice(-2).match(/[kMG]/), scale = unit ? { k: 1e3, M: 1e6, G: 1e9 }[unit[0]] : 1;
  return [0, parseFloat(match[0]) * scale];
}

function compare(a, b) {
  if (a[0] !== b[0]) return a[0] - b[0];
  return a[0] ? a[1].localeCompare(b[1], undefined, { numeric: true }) : a[1] - b[1];
}

function sort(head) {
  const table = head.closest("table"), column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies].flatMap((body) => [...body.rows]);
  const keyed = rows.map((row) => [column ? value(row, column) : [1, row.cells[0].textContent], row]);
  keyed.sort((a, b) => (down ? -1 : 1) * compare(a[0], b[0]));
  const sorted = keyed.map((pair) => pair[1]), first = table.tBodies[0].rows.length;
  table.tBodies[0].replaceChildren(...sorted.slice(0, first));
  table.tBodies[1]?.replaceChildren(...sorted.slice(first));
}

function whole(table) {
  table.classList.add("all");
  const more = table.parentNode.querySelector(".more");
  if (more) more.hidden = true;
}

function search() {
  const words = find.value.trim().toLowerCase().split(/\s+/).filter(Boolean), active = words.length > 0 || marked.checked;
  let count = 0, total = 0;
  for (const table of tables) {
    let here = 0;
    for (const body of table.tBodies) for (const row of body.rows) {
      const text = active ? row.textContent.toLowerCase() : "";
      row.hidden = active && !(words.every((word) => text.includes(word)) &&
        (!marked.checked || row.querySelector(".yellow, .red, .bad") !== null));
      here += !row.hidden;
      total += 1;
    }
    if (active && here && table.tBodies[1]) whole(table);
    (table.closest("details, .wide") ?? table).hidden = active && !here;
    const box = table.closest("details");
    if (box && active && here) box.open = true;
    count += here;
  }
  found.textContent = active ? `${count} of ${total} rows` : "";
}

function target() {
  for (const row of document.querySelectorAll("tr.named")) row.classList.remove("named");
  let id = location.hash.slice(1);
  try { id = decodeURIComponent(id); } catch { return; }
  if (!id.startsWith("node:")) return;
  const name = id.slice(5), named = [...document.querySelectorAll("a.node")].filter((a) => a.textContent === name);
  for (const link of named) {
    link.closest("tr").classList.add("named");
    const box = link.closest("details"), rest = link.closest(".rest");
    if (box) box.open = true;
    if (rest) whole(rest.parentNode);
  }
  named[0]?.scrollIntoView({ block: "center" });
}

for (const head of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  button.addEventListener("click", () => sort(head));
  head.append(button);
}
for (const rest of document.querySelectorAll(".rest")) {
  const table = rest.parentNode, button = document.createElement("button");
  button.type = "button";
  button.className = "more";
  button.textContent = `Show ${rest.rows.length.toLocaleString("en")} more rows`;
  button.addEventListener("click", () => whole(table));
  table.after(button);
}
document.addEventListener("click", (event) => {
  const title = event.target.closest?.("circle")?.textContent;
  if (title) location.hash = `node:${encodeURIComponent(title.slice(0, title.lastIndexOf(": ")))}`;
});
function scrollable() {
  for (const box of document.querySelectorAll(".wide, figure")) box.tabIndex = box.scrollWidth > box.clientWidth ? 0 : -1;
}
let waiting = 0;
find.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
marked.addEventListener("change", search);
addEventListener("hashchange", target);
addEventListener("resize", scrollable);
requestAnimationFrame(() => setTimeout(scrollable));
addEventListener("beforeprint", () => { for (const box of document.querySelectorAll("details")) box.open = true; });
target();
