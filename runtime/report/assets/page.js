"use strict";
// Enhances a page that is complete without it: sorting by a click on a heading, search, links to nodes.
const find = document.getElementById("find"), found = document.getElementById("found");
const rows = [...document.querySelectorAll("tbody tr")];

function value(row, column) {
  const text = (row.cells[column]?.textContent ?? "").trim(), match = text.replaceAll(",", "").match(/-?\d+(\.\d+)?(e[+-]?\d+)?/i);
  if (!match) return [1, text];
  const unit = text.slice(-2).match(/[kMG]/), scale = unit ? { k: 1e3, M: 1e6, G: 1e9 }[unit[0]] : 1;
  return [0, parseFloat(match[0]) * scale];
}

function compare(a, b) {
  if (a[0] !== b[0]) return a[0] - b[0];
  return a[0] ? a[1].localeCompare(b[1], undefined, { numeric: true }) : a[1] - b[1];
}

for (const head of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = [...body.rows].map((row) => [column ? value(row, column) : [1, row.cells[0].textContent], row]);
    keyed.sort((a, b) => (down ? -1 : 1) * compare(a[0], b[0]));
    body.append(...keyed.map((pair) => pair[1]));
  });
}

function search() {
  const wanted = find.value.trim().toLowerCase();
  let count = 0;
  for (const row of rows) {
    row.hidden = wanted !== "" && !row.textContent.toLowerCase().includes(wanted);
    if (!row.hidden) count += 1;
  }
  for (const table of document.querySelectorAll("table")) {
    table.hidden = wanted !== "" && ![...table.tBodies[0].rows].some((row) => !row.hidden);
  }
  if (wanted) for (const box of document.querySelectorAll("details")) box.open = !!box.querySelector("tr:not([hidden])");
  found.textContent = wanted ? `${count} of ${rows.length} rows` : "";
}

function target() {
  for (const row of document.querySelectorAll("tr.named")) row.classList.remove("named");
  const id = decodeURIComponent(location.hash.slice(1));
  if (!id.startsWith("node:")) return;
  const name = id.slice(5), named = [...document.querySelectorAll("a.node")].filter((a) => a.textContent === name);
  for (const link of named) {
    link.closest("tr").classList.add("named");
    const box = link.closest("details");
    if (box) box.open = true;
  }
  named[0]?.scrollIntoView({ block: "center" });
}

find.addEventListener("input", search);
addEventListener("hashchange", target);
target();
