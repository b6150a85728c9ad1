"use strict";
const trials = JSON.parse(document.getElementById("trials").textContent);
const tip = document.getElementById("tip");
const marks = (trial) => document.querySelectorAll(`[data-trial="${trial}"]`);
const pinned = () => (location.hash.match(/^#trial=(\w+)$/) || [])[1];

function light(trial) {
  document.querySelectorAll(".hot").forEach((mark) => mark.classList.remove("hot"));
  document.body.classList.toggle("lit", trial in trials);
  if (trial in trials) marks(trial).forEach((mark) => mark.classList.add("hot"));
}

function point(event) {
  const mark = event.target.closest("[data-trial]");
  light(mark ? mark.dataset.trial : pinned());
  tip.style.visibility = mark ? "visible" : "hidden";
  if (!mark) return;
  tip.textContent = trials[mark.dataset.trial];
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(Math.min(event.clientX + 16, innerWidth - box.width - 8), 8)}px`;
  tip.style.top = `${event.clientY + 20 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 20}px`;
}

// A thin line is hard to hit: each gets a broad, invisible one over it.
document.querySelectorAll("svg [data-trial] > path").forEach((path) => {
  if (getComputedStyle(path).fill !== "none") return;
  const reach = path.cloneNode();
  reach.setAttribute("class", "reach");
  path.after(reach);
});
document.addEventListener("mousemove", point);
document.addEventListener("click", (event) => {
  const mark = event.target.closest("[data-trial]");
  if (mark) history.replaceState(null, "", `#trial=${mark.dataset.trial}`);
  else if (pinned()) history.replaceState(null, "", location.pathname);
  point(event);
});
addEventListener("hashchange", () => light(pinned()));
document.querySelectorAll("button").forEach((button) => button.addEventListener("click", async () => {
  getSelection().selectAllChildren(button.previousElementSibling);
  await navigator.clipboard?.writeText(button.previousElementSibling.textContent);
  button.textContent = "Copied";
}));
light(pinned());
