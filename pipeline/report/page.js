"use strict";
// Everything on the page can be read without this: it filters latents and shows values under the pointer.
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
document.addEventListener("pointerover", (event) => {
  const mark = event.target.closest("mark[title], mark[data-value]");
  tip.hidden = !mark;
  if (!mark) return;
  if (mark.title) {
    mark.dataset.value = mark.title;
    mark.removeAttribute("title");
  }
  tip.textContent = mark.dataset.value;
  const box = mark.getBoundingClientRect();
  tip.style.left = `${Math.min(box.left, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.max(4, box.top - tip.offsetHeight - 4)}px`;
});

const search = document.querySelector("#search");
if (search) {
  search.closest("label").hidden = false;
  const plain = (text) => text.trim().toLowerCase().replace(/\s+/g, " ");
  const named = (f) => `${f.id} ${f.id.replace("-", " ")} latent ${f.textContent}`; // which begins with its number
  const texts = new Map(all(".feature").map((f) => [f, plain(named(f))]));
  const nothing = document.querySelector("#nothing");
  search.addEventListener("input", () => {
    const wanted = plain(search.value);
    for (const [feature, text] of texts) feature.hidden = !text.includes(wanted);
    for (const group of all(".group")) group.hidden = !group.querySelector(".feature:not([hidden])");
    nothing.hidden = all(".feature:not([hidden])").length > 0;
    nothing.textContent = `None of the ${texts.size} latents here matches “${search.value.trim()}”. `
      + "Others are shown by sae report --latents N.";
  });
}

for (const svg of all("svg[data-hover]")) {
  const points = JSON.parse(svg.dataset.hover);
  const caption = svg.closest("figure").querySelector("output");
  const height = svg.viewBox.baseVal.height;
  const line = document.createElementNS(svg.namespaceURI, "line");
  line.setAttribute("class", "cursor");
  line.setAttribute("y1", "12");
  line.setAttribute("y2", String(height - 30));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const nearest = points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    line.setAttribute("x1", nearest[0]);
    line.setAttribute("x2", nearest[0]);
    svg.append(line);
    caption.textContent = nearest[1];
  });
  svg.addEventListener("pointerleave", () => {
    line.remove();
    caption.textContent = "";
  });
}
