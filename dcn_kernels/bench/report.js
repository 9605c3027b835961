"use strict";
// Sorting and filtering of tables, what hovering shows, and the choice of light and dark.

for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (ascending ? 1 : -1) * compare(a.cells[column], b.cells[column]) || a.dataset.row - b.dataset.row);
      rows.sort((a, b) => isEmpty(a.cells[column]) - isEmpty(b.cells[column])); // empty cells last, either way
      table.tBodies[0].append(...rows);
    });
  });
}

function isEmpty(cell) {
  return cell.textContent === "" ? 1 : 0;
}

function compare(a, b) {
  if (a.dataset.value !== undefined && b.dataset.value !== undefined) return a.dataset.value - b.dataset.value;
  return a.textContent.localeCompare(b.textContent, "en", { numeric: true });
}

for (const controls of document.querySelectorAll(".controls")) {
  const table = document.getElementById(controls.dataset.table);
  const words = controls.querySelector("input");
  const choices = [...controls.querySelectorAll("select")];
  const shown = controls.querySelector("output");
  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      const chosen = choices.every((c) => !c.value || row.cells[Number(c.dataset.column)].textContent === c.value);
      row.hidden = !(chosen && wanted.every((word) => text.includes(word)));
      count += row.hidden ? 0 : 1;
    }
    shown.textContent = `${count} of ${table.tBodies[0].rows.length} rows`;
  };
  words.addEventListener("input", filter);
  choices.forEach((choice) => choice.addEventListener("change", filter));
  filter();
}

const tip = document.getElementById("tip");
const show = (event) => {
  const found = event.target.closest("[data-tip]");
  tip.hidden = !found;
  if (!found) return;
  tip.textContent = found.dataset.tip;
  const box = found.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left) + window.scrollX}px`;
  tip.style.top = `${box.bottom + 6 + window.scrollY}px`;
};
document.addEventListener("pointerover", show);
document.addEventListener("focusin", show);

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
