// Polls /fleet each second and shows it. What a page looks like is view.js's.

import { aboutText, findingList, ladderList, remember, replicaTable, shadowList, tileList } from "./view.js";

const INTERVAL_MS = 1000;
const TIMEOUT_MS = 5000;
const KEY = "roost admin key"; // in this tab only, gone when it closes

const byId = (id) => document.getElementById(id);
let goneSince = null;
let timer = 0;

async function poll() {
  // A hidden tab asks for nothing; it is woken below.
  if (document.hidden) return;
  try {
    const key = sessionStorage.getItem(KEY);
    const answer = await fetch("/fleet", {
      headers: key === null ? {} : { authorization: `Bearer ${key}` },
      cache: "no-store",
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    if (answer.status === 401) return askForKey(key);
    if (!answer.ok) throw new Error(`it answered ${answer.status}`);
    show(await answer.json());
  } catch (error) {
    showGone(error);
  }
  clearTimeout(timer); // a key or a look at the tab may have asked meanwhile: one loop stays
  timer = setTimeout(poll, INTERVAL_MS);
}

function show(page) {
  goneSince = null;
  remember(page);
  byId("forget").hidden = sessionStorage.getItem(KEY) === null;
  byId("ask").hidden = true;
  byId("fleet").hidden = false;
  document.body.classList.remove("stale");
  byId("status").textContent = page.is_draining ? "draining" : "live";
  byId("status").className = page.is_draining ? "warning" : "good";
  // Whoever is copying a figure keeps it: nothing is drawn anew under a selection.
  if (!getSelection().isCollapsed) return;
  byId("about").textContent = aboutText(page);
  byId("tiles").replaceChildren(...tileList(page));
  byId("findings").replaceChildren(...findingList(page));
  byId("replicas").replaceChildren(replicaTable(page));
  byId("ladders").replaceChildren(...ladderList(page));
  byId("shadow").replaceChildren(...shadowList(page));
}

function showGone(error) {
  goneSince ??= new Date();
  document.body.classList.add("stale");
  byId("status").textContent =
    `no answer since ${goneSince.toLocaleTimeString()}: ${error.message}. Asking again.`;
  byId("status").className = "bad";
}

function askForKey(wrong) {
  sessionStorage.removeItem(KEY);
  byId("refused").textContent = wrong === null ? "" : "That key was refused.";
  byId("status").textContent = "needs a key";
  byId("status").className = "warning";
  byId("forget").hidden = true;
  byId("fleet").hidden = true;
  byId("ask").hidden = false;
  byId("key").focus();
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key").value = "";
  poll();
});
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  poll();
});
document.addEventListener("visibilitychange", poll);
poll();
