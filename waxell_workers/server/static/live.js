// Keeps `#live` fresh: fetches this page again every 2 s, or as many as its `data-live` says, and swaps that part.
// Pauses while the tab is hidden, while text in it is selected, and while somebody is in its form. Without this
// script the page is the same, but still.
"use strict";

const EVERY_MS = 2000;
const state = document.getElementById("live-state");

function wait() {
  const live = document.getElementById("live");
  setTimeout(refresh, Number(live?.dataset.live) * 1000 || EVERY_MS);
}

function busy(live) {
  const selection = document.getSelection();
  const selected = selection && !selection.isCollapsed && live.contains(selection.anchorNode);
  return document.hidden || selected || live.querySelector("select:focus, input:focus") !== null;
}

function swap(live, fresh) {
  const toggled = new Map([...live.querySelectorAll("details[id]")].map((each) => [each.id, each.open]));
  const focused = live.contains(document.activeElement) ? document.activeElement.id : "";
  for (const each of fresh.querySelectorAll("details[id]")) each.open = toggled.get(each.id) ?? each.open;
  if (live.isEqualNode(fresh)) return;
  live.replaceWith(fresh);
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

async function refresh() {
  const live = document.getElementById("live");
  if (!live?.hasAttribute("data-live")) {
    state.textContent = "";
    return;
  }
  if (!busy(live)) {
    try {
      const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(10000) });
      if (!answer.ok) throw new Error(answer.statusText);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.getElementById("live");
      if (fresh && !busy(live)) swap(live, document.adoptNode(fresh));
      state.textContent = "live";
      state.classList.remove("gone");
    } catch {
      state.textContent = "server not reachable";
      state.classList.add("gone");
    }
  }
  wait();
}

document.addEventListener("change", (event) => {
  if (event.target.id === "agent") event.target.form.submit();
});
if (document.getElementById("live")?.hasAttribute("data-live")) {
  state.textContent = "live";
  wait();
}
