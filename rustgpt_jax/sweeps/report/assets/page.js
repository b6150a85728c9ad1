"use strict";
const trials = JSON.parse(document.getElementById("trials").textContent);
const tip = document.getElementById("tip");
const marks = (trial) => document.querySelectorAll(`[data-trial="${trial}"]`);
const pinned = () => (location.hash.match(/^#trial=(\w+)$/) || [])[1];

function highlight(trial) {
  document.querySelectorAll(".hot").forEach((mark) => mark.classList.remove("hot"));
  document.body.classList.toggle("lit", trial in trials);
  if (trial in trials) marks(trial).forEach((mark) => mark.classList.add("hot"));
}

function followPointer(event) {
  const mark = event.target.closest("[data-trial]");
  highlight(mark ? mark.dataset.trial : pinned());
  tip.style.visibility = mark ? "visible" : "hidden";
  if (!mark) return;
  tip.textContent = trials[mark.dataset.trial];
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(Math.min(event.clientX + 16, innerWidth - box.width - 8), 8)}px`;
  tip.style.top = `${event.clientY + 20 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 20}px`;
}

// Each thin line gets a wide, invisible copy that is easier to hover over.
document.querySelectorAll("svg [data-trial] > path").forEach((path) => {
  if (getComputedStyle(path).fill !== "none") return;
  const target = path.cloneNode();
  target.setAttribute("class", "reach");
  path.after(target);
});
document.addEventListener("mousemove", followPointer);
document.addEventListener("click", (event) => {
  const mark = event.target.closest("[data-trial]");
  if (mark) history.replaceState(null, "", `#trial=${mark.dataset.trial}`);
  else if (pinned()) history.replaceState(null, "", location.pathname);
  followPointer(event);
});
addEventListener("hashchange", () => highlight(pinned()));
document.querySelectorAll("button").forEach((button) => button.addEventListener("click", async () => {
  getSelection().selectAllChildren(button.previousElementSibling);
  await navigator.clipboard?.writeText(button.previousElementSibling.textContent);
  button.textContent = "Copied";
}));
highlight(pinned());
