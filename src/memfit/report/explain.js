"use strict";
// The page's data are rows of bytes alive from one chosen instant to another (see explain_html.series).
const D = JSON.parse(document.getElementById("data").textContent), W = D.words, C = D.stack;
const el = (id) => document.getElementById(id), N = D.clock.length;
const number = new Intl.NumberFormat(D.lang);
const START = []; D.first.reduce((sum, step, row) => START[row] = sum + step, 0);
const PATHS = [[]]; for (const [parent, name] of D.modules) PATHS.push([...PATHS[parent], name]);
const LEVEL = C.map(() => new Float64Array(N + 1)), TOTAL = new Float64Array(N);
D.group.forEach((g, row) => {
  const level = LEVEL[D.groups[g][0]], size = D.bytes[row] * D.count[row];
  level[START[row]] += size; level[START[row] + D.length[row]] -= size;
});
for (const level of LEVEL) for (let i = 0; i < N; i++) { if (i) level[i] += level[i - 1]; TOTAL[i] += level[i]; }

function bytes(n) {
  for (const [unit, scale] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 1024]])
    if (n >= scale) return `${Number((n / scale).toPrecision(4))} ${unit}`;
  return `${Math.round(n)} B`;
}
function make(tag, attributes = {}, text = "", svg = false) {
  const e = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const key in attributes) e.setAttribute(key, attributes[key]);
  if (text) e.textContent = text;
  return e;
}
const spanAt = (clock) => D.spans.find((s) => s[2] <= clock && clock < s[3]) ?? D.spans.at(-1);
function where(i) {
  const [phase, step] = spanAt(D.clock[i]);
  return `${W[phase]} · ${W.step} ${step + 1} · ${W.tick} ${number.format(D.clock[i])}`;
}
function tip(text, x, y) {
  const t = el("tip"); t.hidden = !text; t.textContent = text;
  if (!text) return;
  const box = t.getBoundingClientRect();
  t.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - box.width - 6))}px`;
  t.style.top = `${y + 18 + box.height > innerHeight ? Math.max(6, y - box.height - 12) : y + 18}px`;
}

// -- the timeline ------------------------------------------------------------------------------------
const plot = el("plot"), PAD = { left: 76, right: 10, top: 44, bottom: 8 };
let view = [0, D.end], now = D.peak, hover = null, path = [];
const inner = () => Math.max(50, plot.clientWidth - PAD.left - PAD.right);
const X = (clock) => PAD.left + (clock - view[0]) / (view[1] - view[0]) * inner();
function nearest(px) {
  const clock = view[0] + (px - plot.getBoundingClientRect().left - PAD.left) / inner() * (view[1] - view[0]);
  let low = 0, high = N - 1;
  while (low < high) { const mid = (low + high + 1) >> 1; if (D.clock[mid] <= clock) low = mid; else high = mid - 1; }
  return low;
}
function drawPlot() {
  const height = plot.clientHeight, base = height - PAD.bottom, right = PAD.left + inner();
  let a = 0, b = N - 1;
  while (a + 1 < N && D.clock[a + 1] <= view[0]) a++;
  while (b > a && D.clock[b] > view[1]) b--;
  const most = Math.max(1, ...TOTAL.subarray(a, b + 1)) * 1.12;
  const Y = (n) => base - n / most * (base - PAD.top);
  const svg = make("svg", { width: "100%", height, "aria-hidden": "true" }, "", true);
  const add = (tag, attributes, text) => svg.append(make(tag, attributes, text, true));
  const wide = (text, size) => [...text].reduce((n, c) => n + (c > "\u2e80" ? size : size * .56), 0) + 6;
  const label = (from, to, y, text) => {
    const left = Math.max(PAD.left, X(from)), end = Math.min(right, X(to));
    if (end - left > wide(text, 12.5)) add("text", { x: (left + end) / 2, y, class: "x" }, text);
  };
  for (const [phase, , from, to] of D.spans) {
    const left = Math.max(PAD.left, X(from)), end = Math.min(right, X(to));
    if (end <= left) continue;
    add("rect", { x: left, y: 20, width: end - left, height: base - 20, class: "phase" });
    label(from, to, 35, W[phase]);
  }
  for (const step of new Set(D.spans.map((s) => s[1]))) {
    const own = D.spans.filter((s) => s[1] === step && s[0] !== "setup");
    if (own.length) label(own[0][2], own.at(-1)[3], 14, `${W.step} ${step + 1}`);
  }
  const grid = 2 ** Math.ceil(Math.log2(most / 5));
  for (let n = 0; n < most; n += grid) {
    add("line", { x1: PAD.left, x2: right, y1: Y(n), y2: Y(n), class: "grid" });
    add("text", { x: PAD.left - 8, y: Y(n) + 4, class: "y" }, bytes(n));
  }
  const clip = (clock) => Math.max(PAD.left, Math.min(right, X(clock))).toFixed(1);
  const below = new Float64Array(N);
  C.forEach((category, c) => {
    let up = "", down = "";
    for (let i = a; i <= b; i++) {
      const from = clip(D.clock[i]), to = clip(i + 1 < N ? D.clock[i + 1] : D.end);
      down = `L${to},${Y(below[i]).toFixed(1)}L${from},${Y(below[i]).toFixed(1)}` + down;
      below[i] += LEVEL[c][i];
      up += `${up ? "L" : "M"}${from},${Y(below[i]).toFixed(1)}L${to},${Y(below[i]).toFixed(1)}`;
    }
    add("path", { d: `${up}${down}Z`, class: `c-${category}` });
  });
  for (const [, , from] of D.spans)
    if (from > view[0] && from < view[1]) add("line", { x1: X(from), x2: X(from), y1: 20, y2: base, class: "cut" });
  const inside = (i) => D.clock[i] >= view[0] && D.clock[i] <= view[1];
  const rule = (i, css) => add("line", { x1: X(D.clock[i]), x2: X(D.clock[i]), y1: PAD.top - 4, y2: base, class: css });
  if (hover !== null && inside(hover)) rule(hover, "hover");
  if (inside(now)) { rule(now, "now"); add("circle", { cx: X(D.clock[now]), cy: Y(TOTAL[now]), r: 5, class: "dot" }); }
  if (inside(D.peak)) {
    const x = X(D.clock[D.peak]), y = Y(TOTAL[D.peak]), text = bytes(TOTAL[D.peak]);
    add("path", { d: `M${x - 5},${y - 13}h10l-5,7z`, class: "top" });
    const left = x + wide(text, 13) > right;
    add("text", { x: x + (left ? -9 : 9), y: y - 6, class: `peak ${left ? "end" : "start"}` }, text);
  }
  plot.replaceChildren(svg);
  plot.setAttribute("aria-valuemax", N - 1); plot.setAttribute("aria-valuenow", now);
  plot.setAttribute("aria-valuetext", `${where(now)}: ${bytes(TOTAL[now])}`);
}
function look(from, to) {
  const width = Math.min(D.end, Math.max(8, to - from));
  from = Math.max(0, Math.min(D.end - width, from));
  view = [from, from + width]; drawPlot();
}
function zoom(factor, clock = D.clock[now]) {
  const mid = clock >= view[0] && clock <= view[1] ? clock : (view[0] + view[1]) / 2;
  look(mid - (mid - view[0]) * factor, mid + (view[1] - mid) * factor);
}
function select(i) {
  now = Math.max(0, Math.min(N - 1, i));
  const clock = D.clock[now], width = view[1] - view[0];
  if (clock < view[0] || clock > view[1]) look(clock - width / 2, clock + width / 2); else drawPlot();
  el("now").textContent = `${where(now)} · ${bytes(TOTAL[now])}`;
  for (const li of el("legend").children) {
    const size = LEVEL[C.indexOf(li.dataset.category)][now];
    li.lastElementChild.textContent = size ? `${bytes(size)} · ${(100 * size / TOTAL[now]).toFixed(1)} %` : "0 B";
    li.classList.toggle("none", !size);
  }
  drawMap(); drawTable();
}
let grip = null;
plot.addEventListener("wheel", (e) => {
  e.preventDefault();
  if (Math.abs(e.deltaX) > Math.abs(e.deltaY)) return look(view[0] + e.deltaX / inner() * (view[1] - view[0]), view[1] + e.deltaX / inner() * (view[1] - view[0]));
  const share = (e.clientX - plot.getBoundingClientRect().left - PAD.left) / inner();
  zoom(e.deltaY > 0 ? 1.25 : .8, view[0] + Math.max(0, Math.min(1, share)) * (view[1] - view[0]));
}, { passive: false });
plot.addEventListener("pointerdown", (e) => { grip = { x: e.clientX, view, moved: false }; plot.setPointerCapture(e.pointerId); });
plot.addEventListener("pointermove", (e) => {
  if (grip && Math.abs(e.clientX - grip.x) > 4) { grip.moved = true; plot.classList.add("moving"); }
  if (grip?.moved) {
    const by = (grip.x - e.clientX) / inner() * (grip.view[1] - grip.view[0]);
    tip(""); return look(grip.view[0] + by, grip.view[1] + by);
  }
  hover = nearest(e.clientX); drawPlot();
  const parts = C.map((c, k) => [LEVEL[k][hover], W[c]]).filter((p) => p[0]).reverse();
  tip([where(hover), `${W.total} ${bytes(TOTAL[hover])}`, ...parts.map(([n, name]) => `${name} ${bytes(n)}`)].join("\n"), e.clientX, e.clientY);
});
let last = { t: -1e9, x: 0 }; // a click redraws the plot, after which browsers send no double click
plot.addEventListener("pointerup", (e) => {
  plot.classList.remove("moving");
  const still = grip && !grip.moved, twice = e.timeStamp - last.t < 400 && Math.abs(e.clientX - last.x) < 8;
  grip = null;
  if (!still) return;
  if (twice) look(0, D.end); else select(nearest(e.clientX));
  last = { t: twice ? -1e9 : e.timeStamp, x: e.clientX };
});
plot.addEventListener("pointercancel", () => { grip = null; plot.classList.remove("moving"); });
plot.addEventListener("pointerleave", () => { hover = null; tip(""); drawPlot(); });
plot.addEventListener("keydown", (e) => {
  const far = e.shiftKey ? Math.max(1, Math.round(N / 50)) : 1;
  const act = {
    ArrowLeft: () => select(now - far), ArrowRight: () => select(now + far), Home: () => select(0), End: () => select(N - 1),
    "+": () => zoom(.8), "=": () => zoom(.8), "-": () => zoom(1.25), "0": () => look(0, D.end), p: () => select(D.peak), Escape: () => look(0, D.end),
  }[e.key];
  if (act) { e.preventDefault(); act(); }
});
el("in").onclick = () => zoom(.5); el("out").onclick = () => zoom(2);
el("all").onclick = () => look(0, D.end); el("to-peak").onclick = () => select(D.peak);

// -- the treemap -------------------------------------------------------------------------------------
function* aliveRows() {
  for (let row = 0; row < START.length && START[row] <= now; row++)
    if (now < START[row] + D.length[row]) yield [D.groups[D.group[row]], D.bytes[row] * D.count[row], D.count[row]];
}
function tree() {
  const root = { name: W.everything, kids: new Map(), size: 0, count: 0, up: null };
  for (const [[category, module, op, line], size, count] of aliveRows()) {
    const names = [W[C[category]], ...PATHS[module], D.ops[op] + (D.lines[line] ? ` · ${D.lines[line]}` : "")];
    let node = root;
    node.size += size; node.count += count;
    names.forEach((name, depth) => {
      const key = depth === names.length - 1 ? `${name}\n` : name; // an operator is no module of that name
      if (!node.kids.has(key)) node.kids.set(key, { key, name, kids: new Map(), size: 0, count: 0, css: `c-${C[category]}`, up: node });
      node = node.kids.get(key);
      node.size += size; node.count += count;
    });
  }
  return root;
}
function squarify(nodes, box, put) {
  let { x, y, w, h } = box, left = nodes.reduce((n, k) => n + k.size, 0), row = [], sum = 0;
  const worst = (row, sum) => { const side = Math.min(w, h), thick = sum / left * w * h / side;
    return Math.max(...row.map((k) => { const long = k.size / sum * side; return Math.max(long / thick, thick / long); })); };
  const lay = () => {
    const across = w < h, thick = sum / left * (across ? h : w);
    let at = across ? x : y;
    for (const k of row) {
      const long = k.size / sum * (across ? w : h);
      put(k, across ? { x: at, y, w: long, h: thick } : { x, y: at, w: thick, h: long });
      at += long;
    }
    if (across) { y += thick; h -= thick; } else { x += thick; w -= thick; }
    left -= sum; row = []; sum = 0;
  };
  for (const k of nodes) {
    if (row.length && worst([...row, k], sum + k.size) > worst(row, sum)) lay();
    row.push(k); sum += k.size;
  }
  if (row.length) lay();
}
const HEAD = 22;
function fill(parent, box, depth, map, root) {
  const scale = box.w * box.h / parent.size, kids = [...parent.kids.values()].sort((a, b) => b.size - a.size);
  const small = kids.filter((k) => k.size * scale < 60), shown = kids.filter((k) => k.size * scale >= 60);
  if (small.length) shown.push({ name: W.others, kids: new Map(), css: small[0].css, up: parent, rest: true,
    size: small.reduce((n, k) => n + k.size, 0), count: small.reduce((n, k) => n + k.count, 0) });
  squarify(shown, box, (node, r) => {
    let name = /^\d+$/.test(node.name) && node.up.up ? `${node.up.name}.${node.name}` : node.name;
    while (node.kids.size === 1 && [...node.kids.values()][0].kids.size) { node = [...node.kids.values()][0]; name += `.${node.name}`; }
    const deeper = node.kids.size > 0 && depth < 6 && r.w > (depth < 2 ? 90 : 130) && r.h > (depth < 2 ? 58 : 84);
    const into = node.kids.size ? node : node.up, share = (100 * node.size / root.size).toFixed(1);
    const full = []; for (let n = node; n.up; n = n.up) full.unshift(n.name);
    const said = `${full.join(" › ")}\n${bytes(node.size)} · ${share} % · ${number.format(node.count)}×`;
    const css = `tile ${node.css} ${node.kids.size ? "" : "leaf"} ${r.h > 58 && !deeper ? "tall" : ""}`;
    const tile = make("button", { type: "button", class: css, "aria-label": said.replace("\n", ", "),
      style: `left:${r.x}px;top:${r.y}px;width:${r.w}px;height:${r.h}px;--mix:${20 + 8 * depth}%` });
    if (r.w > 34 && r.h > 17) {
      if (deeper) tile.append(make("span", { class: "group" }, `${name}  ${bytes(node.size)}`));
      else { tile.append(make("span", {}, name)); if (r.h > 40) tile.append(make("small", {}, bytes(node.size))); }
    } else tile.style.padding = 0;
    if (r.w < 60 || r.h < 24) tile.tabIndex = -1;
    tile.onclick = () => { path = trail(into).map((n) => n.key); drawMap(); };
    tile.onpointermove = (e) => tip(said, e.clientX, e.clientY);
    tile.onpointerleave = tile.onblur = () => tip("");
    tile.onfocus = () => { if (tile.matches(":focus-visible")) { const b = tile.getBoundingClientRect(); tip(said, b.left, b.top + 14); } };
    map.append(tile);
    if (deeper) fill(node, { x: r.x + 3, y: r.y + HEAD, w: r.w - 6, h: r.h - HEAD - 3 }, depth + 1, map, root);
  });
}
const trail = (node) => { const out = []; for (; node.up; node = node.up) out.unshift(node); return out; };
function drawMap() {
  const map = el("map"), root = tree();
  let node = root;
  for (const key of path) { if (!node.kids.get(key)?.kids.size) break; node = node.kids.get(key); }
  const crumbs = [root, ...trail(node)];
  el("crumbs").replaceChildren(...crumbs.flatMap((n, i) => {
    const last = i === crumbs.length - 1;
    const button = make("button", last ? { type: "button", "aria-current": "true" } : { type: "button" }, last ? `${n.name}  ${bytes(n.size)}` : n.name);
    button.onclick = () => { path = trail(n).map((k) => k.key); drawMap(); };
    return i ? [document.createTextNode("›"), button] : [button];
  }));
  tip(""); map.replaceChildren();
  if (node.size) fill(node, { x: 0, y: 0, w: map.clientWidth, h: map.clientHeight }, node === root ? 0 : 1, map, root);
}
el("map").addEventListener("keydown", (e) => { if (e.key === "Escape" || e.key === "Backspace") { path.pop(); drawMap(); el("crumbs").lastElementChild.focus(); } });

function drawTable() {
  const sums = new Map();
  for (const [[category, module, op, line], size, count] of aliveRows()) {
    const name = PATHS[module].map((part) => /^\d+$/.test(part) ? "*" : part).join(".") || W.root;
    const key = [category, name, D.ops[op], D.lines[line]].join("\n"), sum = sums.get(key) ?? { size: 0, count: 0 };
    sum.size += size; sum.count += count; sums.set(key, sum);
  }
  const top = [...sums].sort((a, b) => b[1].size - a[1].size).slice(0, 15);
  el("rows").replaceChildren(...top.map(([key, { size, count }]) => {
    const [category, ...texts] = key.split("\n"), row = make("tr", { class: `c-${C[category]}` }), head = make("th", { scope: "row" });
    head.append(make("i"), W[C[category]]);
    row.append(head, ...texts.map((t) => make("td", {}, t)), make("td", { class: "n" }, bytes(size)), make("td", { class: "n" }, number.format(count)));
    return row;
  }));
}
for (const li of [...el("legend").children]) if (!LEVEL[C.indexOf(li.dataset.category)].some(Boolean)) li.remove();
new ResizeObserver(() => { drawPlot(); drawMap(); }).observe(document.body);
select(D.peak);
