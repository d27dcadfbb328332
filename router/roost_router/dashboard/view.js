// A page of /fleet as elements. Text only ever becomes text: names of models come from replicas.

const HISTORY = 120; // seconds of each sparkline
const MIN_LOSS = 0.01;
const SVG = "http://www.w3.org/2000/svg";

const percent = (share) => (share === null ? "–" : `${(share * 100).toFixed(1)} %`);
const seconds = (value) => (value === null ? "–" : `${value.toFixed(3)} s`);
const count = (value) => value.toLocaleString("en");
const rate = (value) => value.toFixed(1);

const TILES = [
  ["Requests/s", (p) => p.totals.traffic.requests_per_s, rate],
  ["Failures/s", (p) => p.totals.traffic.failures_per_s, rate],
  ["Hit rate", (p) => p.totals.traffic.hit_rate, percent],
  ["TTFT p50", (p) => p.totals.traffic.ttft_p50_s, seconds],
  ["TTFT p99", (p) => p.totals.traffic.ttft_p99_s, seconds],
  ["In flight", (p) => p.totals.in_flight, count],
  ["Queued tokens", (p) => p.totals.queued_tokens, count],
  ["Held", (p) => p.totals.held_requests, count],
];

const histories = new Map(TILES.map(([name]) => [name, []]));

/** Keep the figures of `page` for the sparklines. */
export function remember(page) {
  for (const [name, read] of TILES) {
    const history = histories.get(name);
    history.push(read(page));
    if (history.length > HISTORY) history.shift();
  }
}

export function aboutText(page) {
  const { replicas_up: up, replicas } = page.totals;
  const compiled = page.is_compiled ? "compiled" : "interpreted";
  return `${page.version}, ${compiled}, up ${duration(page.uptime_s)}, ${up} of ${replicas} replicas up`;
}

export function tileList(page) {
  return TILES.map(([name, read, write]) =>
    element("div", "tile", element("h2", "", name), element("p", "", write(read(page))), spark(name)),
  );
}

export function findingList(page) {
  if (!page.findings.length) return [];
  const items = page.findings.map(({ severity, replica, what, cure }) =>
    element(
      "li",
      "",
      chip(severity, { error: "bad", warning: "warning", note: "" }[severity]),
      element("strong", "", replica || "fleet"),
      ` ${what}`,
      element("p", "cure", cure),
    ),
  );
  return [element("h2", "", "Findings"), element("ul", "", ...items)];
}

const COLUMNS = [
  ["Replica", (r) => r.name],
  ["State", state],
  ["In flight", (r) => count(r.in_flight)],
  ["Decoding", (r) => count(r.decoding)],
  ["Queued tokens", (r) => count(r.queued_tokens)],
  ["KV in use", (r) => bar(r.reported.kv_usage)],
  ["KV tokens", (r) => (r.kv_capacity_tokens === null ? "–" : count(r.kv_capacity_tokens))],
  ["Known by", (r) => r.known_by],
  ["Hit rate", (r) => bar(r.traffic.hit_rate)],
  ["Requests/s", (r) => rate(r.traffic.requests_per_s)],
  ["Failures/s", (r) => rate(r.traffic.failures_per_s)],
  ["TTFT p50", (r) => seconds(r.traffic.ttft_p50_s)],
  ["TTFT p99", (r) => seconds(r.traffic.ttft_p99_s)],
  ["Model", (r) => r.models.join(", ")],
];
const TEXTS = new Set(["Replica", "State", "Known by", "Model"]);

export function replicaTable(page) {
  const kind = (name) => (TEXTS.has(name) ? "" : "number");
  const heads = COLUMNS.map(([name]) => {
    const head = element("th", kind(name), name);
    head.scope = "col";
    return head;
  });
  const rows = page.replicas.map((replica) =>
    element("tr", "", ...COLUMNS.map(([name, cell]) => element("td", kind(name), cell(replica)))),
  );
  const caption = element("caption", "", "Replicas");
  return element(
    "table",
    "",
    caption,
    element("thead", "", element("tr", "", ...heads)),
    element("tbody", "", ...rows),
  );
}

export function ladderList(page) {
  return page.ladders.flatMap(({ model, recent, since_start: sinceStart }) => {
    const [shown, span] = recent.num_requests
      ? [recent, "last 10 minutes"]
      : [sinceStart, "since the start"];
    const rungs = page.rungs.map((rung, place) =>
      rungItem(rung, shown.shares[place], shown.lost[place]),
    );
    const doubled = shown.doubled - shown.shares[1] >= MIN_LOSS;
    return [
      element("h2", "", `Where cache hits go: ${model}`),
      element(
        "p",
        "quiet",
        `Shares of ${count(shown.prompt_tokens)} prompt tokens in ${count(shown.num_requests)} requests, ${span}.`,
        doubled ? ` With twice the KV memory the second would be ${percent(shown.doubled)}.` : "",
      ),
      element("ol", "ladder", ...rungs),
    ];
  });
}

export function shadowList({ shadow }) {
  if (shadow === null) return [];
  return [
    element("h2", "", `Shadow policy: ${shadow.policy}`),
    element(
      "p",
      "quiet",
      `Agrees with ${percent(shadow.agreement)} of ${count(shadow.num_decisions)} decisions in the `,
      `last 10 minutes, failed at ${count(shadow.num_failed)}. Its choices were predicted to wait `,
      `${seconds(shadow.shadow_wait_s)} against ${seconds(shadow.wait_s)}, and to find `,
      `${percent(shadow.shadow_hit_rate)} of prompt tokens in cache against `,
      `${percent(shadow.hit_rate)}.`,
    ),
  ];
}

function rungItem({ name, loss, cure }, share, lost) {
  const item = element("li", "", element("span", "rung", name), bar(share, cure && lost));
  if (lost !== null && lost >= MIN_LOSS) {
    item.append(element("p", "loss", `${percent(lost)} lost: ${loss}`));
    if (cure) item.append(element("p", "cure", cure));
  }
  return item;
}

function state({ state: name, ejection }) {
  if (name === "draining") return chip(name, "warning");
  if (name !== "up") return chip(name, "bad");
  if (ejection === null) return chip("up", "good");
  const left = ejection.left_s ? `ejected, ${Math.ceil(ejection.left_s)} s left` : "probing";
  return element("span", "", chip(left, "warning"), element("span", "reason", ejection.reason));
}

function chip(text, kind) {
  return element("span", `chip ${kind}`, text);
}

/** A share as a bar and a figure, and what was lost of it behind. */
function bar(share, lost = 0) {
  if (share === null) return "–";
  const drawing = svg("svg", { class: "bar", viewBox: "0 0 100 8", preserveAspectRatio: "none" });
  const within = (value) => Math.min(1, Math.max(0, value)) * 100;
  drawing.append(
    svg("rect", { class: "rest", width: 100, height: 8 }),
    svg("rect", { class: "lost", width: within(share + lost), height: 8 }),
    svg("rect", { class: "full", width: within(share), height: 8 }),
  );
  return element("span", "share", drawing, element("span", "", percent(share)));
}

function spark(name) {
  const history = histories.get(name);
  const most = Math.max(...history.map((value) => value ?? 0), 1e-9);
  const points = history
    .map((value, place) => [place + HISTORY - history.length, 20 - (18 * (value ?? 0)) / most])
    .map(([x, y]) => `${x},${y.toFixed(1)}`);
  const drawing = svg("svg", {
    class: "spark",
    viewBox: `0 0 ${HISTORY - 1} 22`,
    preserveAspectRatio: "none",
  });
  drawing.append(svg("polyline", { points: points.join(" ") }));
  return drawing;
}

function duration(value) {
  const minutes = Math.floor(value / 60);
  const hours = Math.floor(minutes / 60);
  if (hours >= 24) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.floor(value % 60)} s` : `${Math.floor(value)} s`;
}

function element(tag, kind, ...children) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
}

function svg(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (tag === "svg") made.setAttribute("aria-hidden", "true");
  return made;
}
