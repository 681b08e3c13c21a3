// Keys for pages that work without it: j and k go from line to line, / to the search, n and p from page to page.
"use strict";
const step = by => {
  const stops = [...document.querySelectorAll(".stop")];
  const next = stops.indexOf(document.activeElement) + by;
  if (stops.length) stops[Math.min(Math.max(next, 0), stops.length - 1)].focus();
};
const follow = rel => document.querySelector(`a[rel=${rel}]`)?.click();
const keys = {
  j: () => document.querySelector(".stop") ? step(1) : follow("next"),
  k: () => document.querySelector(".stop") ? step(-1) : follow("prev"),
  n: () => follow("next"),
  p: () => follow("prev"),
  "/": () => document.querySelector("input[type=search]")?.focus(),
};
document.addEventListener("keydown", event => {
  const writing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
  if (event.key === "Escape" && writing) event.target.blur();
  if (writing || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(keys, event.key)) return;
  event.preventDefault();
  keys[event.key]();
});
