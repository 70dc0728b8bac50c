"use strict";
// Asks what the page would be made of now, and loads it anew when that has changed; what was opened stays open.
(() => {
  const told = document.getElementById("live");
  const open = "lpl-open";
  const details = () => [...document.querySelectorAll("details")];
  const kept = JSON.parse(sessionStorage.getItem(open) || "[]");
  details().forEach((element, i) => { if (kept.includes(i)) element.open = true; });
  const leave = () => {
    sessionStorage.setItem(open, JSON.stringify(details().flatMap((element, i) => (element.open ? [i] : []))));
    location.reload();
  };
  const ask = async () => {
    try {
      const state = await (await fetch("state", { cache: "no-store" })).text();
      if (state !== document.body.dataset.live) return leave();
      told.textContent = "reloads itself when the runs have written more";
    } catch {
      told.textContent = "lpl report --serve has ended: this is the last page";
    }
    setTimeout(ask, 3000);
  };
  setTimeout(ask, 3000);
})();
