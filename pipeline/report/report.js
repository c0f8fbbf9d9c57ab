// Adds to what is there without it: sorted and filtered tables, a copy button, larger pictures.
"use strict";

for (const table of document.querySelectorAll("table[data-sorts]")) {
  const body = table.tBodies[0];
  const rows = [...body.rows].filter((row) => !row.classList.contains("reason"));
  const withReason = (row) => (row.classList.contains("explained") ? [row, row.nextElementSibling] : [row]);
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (head.hasAttribute("data-plain") || head.querySelector(".unseen") || rows.length < 2) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => key(a).localeCompare(key(b), "en", { numeric: true });
      const number = (row) => Number(row.cells[column].dataset.value);
      const order = rows[0].cells[column].dataset.value === undefined ? compare : (a, b) => number(a) - number(b);
      rows.sort((a, b) => (up ? order(a, b) : order(b, a)));
      body.append(...rows.flatMap(withReason));
    });
  });
}

for (const input of document.querySelectorAll("[data-filters]")) {
  const rows = [...document.getElementById(input.dataset.filters).rows];
  const said = input.parentElement.querySelector("output");
  input.parentElement.hidden = false;
  input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    said.textContent = wanted ? `${rows.filter((row) => !row.hidden).length} of ${rows.length}` : "";
  });
}

for (const button of document.querySelectorAll("[data-copies]")) {
  const source = document.getElementById(button.dataset.copies);
  const label = button.firstChild;
  button.hidden = false;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(source.textContent);
      label.data = "Copied";
    } catch {
      getSelection().selectAllChildren(source);
      label.data = "Selected";
    }
    setTimeout(() => { label.data = "Copy"; }, 2000);
  });
}

if (window.HTMLDialogElement) {
  const viewer = document.createElement("dialog");
  const caption = document.createElement("p");
  const close = document.createElement("button");
  close.type = "button";
  close.textContent = "Close";
  close.addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.setAttribute("aria-label", "Larger picture");
  document.body.append(viewer);
  for (const image of document.querySelectorAll("img.zoom")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "zoomable";
    button.setAttribute("aria-label", `Enlarge: ${image.alt}`);
    image.replaceWith(button);
    button.append(image);
    button.addEventListener("click", () => {
      const larger = document.createElement("img");
      larger.src = image.src;
      larger.alt = image.alt;
      larger.classList.toggle("tiny", image.classList.contains("tiny"));
      caption.textContent = image.alt;
      viewer.replaceChildren(larger, caption, close);
      viewer.showModal();
      close.focus();
    });
  }
}
