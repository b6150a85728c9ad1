"use strict";
const tip = document.getElementById("tip");
document.addEventListener("mousemove", (event) => {
  const cell = event.target.closest("[data-tip]");
  tip.style.visibility = cell ? "visible" : "hidden";
  if (!cell) return;
  tip.textContent = cell.dataset.tip;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(Math.min(event.clientX + 16, innerWidth - box.width - 8), 8)}px`;
  tip.style.top = `${event.clientY + 20 + box.height > innerHeight ? event.clientY - box.height - 12 : event.clientY + 20}px`;
});
