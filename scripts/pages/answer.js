"use strict";
// The arithmetic of the calculator: a traced step at the chosen batch and length, its peak, and what PyTorch's
// caching allocator reserves for it. It answers as memfit/cost does in Python, with which tests compare it.
const CATEGORY = 1, STREAM = 2, PART = 3; // places in a kind; its first entry is the number of its size
const SMALL = 2 ** 20, PACKED = 10 * SMALL, PAGE = 2 * SMALL, SEGMENT = 20 * SMALL;

// -- the caching allocator, without options (memfit/cost/allocator.py) -----------------------------------
function place(free, size, address) {
  let low = 0, high = free.length;
  while (low < high) {
    const mid = (low + high) >> 1, block = free[mid];
    if (block.size < size || (block.size === size && block.address < address)) low = mid + 1; else high = mid;
  }
  return low;
}
// What the allocator reserves at most, and counts as allocated at most: with the rests of blocks that it does not cut off.
function allocatorPeaks(events, sizes, streams) {
  const pools = new Map(), live = new Map();
  let reserved = 0, address = 0, allocated = 0, counted = 0;
  const add = (block) => { block.idle = true; block.pool.splice(place(block.pool, block.size, block.address), 0, block); };
  const remove = (block) => block.pool.splice(place(block.pool, block.size, block.address), 1);
  for (const event of events) {
    if (event >= 0) {
      const size = sizes[event], small = size <= SMALL, key = 2 * streams[event] + small;
      let free = pools.get(key);
      if (!free) pools.set(key, free = []);
      const at = place(free, size, -1);
      let block = free[at];
      if (block) free.splice(at, 1);
      else {
        const whole = small ? PAGE : size < PACKED ? SEGMENT : Math.ceil(size / PAGE) * PAGE;
        block = { pool: free, address, size: whole, before: null, after: null };
        reserved += whole; address += whole;
      }
      const rest = block.size - size;
      if (small ? rest >= 512 : rest > SMALL) {
        const left = { pool: free, address: block.address + size, size: rest, before: block, after: block.after };
        if (left.after) left.after.before = left;
        block.after = left; block.size = size; add(left);
      }
      block.idle = false; live.set(event, block);
      allocated += block.size; counted = Math.max(counted, allocated);
    } else {
      const block = live.get(-1 - event), { before, after } = block;
      live.delete(-1 - event); allocated -= block.size;
      if (before?.idle) {
        remove(before); block.address = before.address; block.size += before.size; block.before = before.before;
        if (block.before) block.before.after = block;
      }
      if (after?.idle) {
        remove(after); block.size += after.size; block.after = after.after;
        if (block.after) block.after.before = block;
      }
      add(block);
    }
  }
  return { reserved, counted }; // segments are never given back, so that the last level is the highest
}

// -- frees that come late, drawn as by numpy.random.default_rng(0).integers (memfit/cost/memory_estimate.py) --
const WORDS = []; // 32 bits each, as PCG64 gives them
function drawTo(count, random) {
  const mask = (1n << 128n) - 1n, low = (1n << 64n) - 1n;
  while (WORDS.length < count) {
    random.at = (BigInt(random.at ?? random.state) * 0x2360ed051fc65da44385df649fccf645n + BigInt(random.inc)) & mask;
    const turn = random.at >> 122n, mixed = (random.at >> 64n) ^ (random.at & low);
    const word = ((mixed >> turn) | (mixed << ((64n - turn) & 63n))) & low;
    WORDS.push(Number(word & 0xffffffffn), Number(word >> 32n));
  }
}
function shifts(count, by, random) {
  const span = by + 1, refused = 2 ** 32 % span, out = new Uint8Array(count);
  for (let i = 0, at = 0; i < count; i++) {
    let product;
    do { drawTo(at + 1, random); product = WORDS[at++] * span; } while (product % 2 ** 32 < refused);
    out[i] = Math.floor(product / 2 ** 32);
  }
  return out;
}
function delayed(events, by, random) {
  const late = shifts(events.length, by, random), buckets = [];
  const out = [];
  for (let i = 0; i < events.length || i < buckets.length; i++) {
    if (i < events.length) {
      if (events[i] >= 0) out.push(events[i]);
      else (buckets[i + late[i]] ??= []).push(events[i]);
    }
    if (buckets[i]) out.push(...buckets[i]);
  }
  return out;
}

// -- memory inside CUDA's kernels (memfit/cost/cuda_workspaces.py, workspaces.py) ------------------------------
const product = (numbers) => numbers.reduce((a, b) => a * b, 1);
const itemBytes = (dtype) => Number(/\d+/.exec(dtype)?.[0] ?? 8) / 8;
const upTo = (n, step) => Math.ceil(n / step) * step;
const powerBelow = (n) => 2 ** Math.floor(Math.log2(Math.max(1, n)));
function copyBytes({ shape, strides, elements, item }) {
  let expected = 1;
  for (let d = shape.length - 1; d >= 0; expected *= shape[d--]) if (shape[d] !== 1 && strides[d] !== expected) return elements * item;
  return 0;
}
// Partial results of a sum that several blocks of threads share; on a card with so many multiprocessors and threads of each.
function partialSums([tensor, dims], card) {
  if (!Array.isArray(dims) || !dims.length || !tensor.elements) return 0;
  const { shape, strides, elements } = tensor, reduced = new Set(dims.map((d) => (d + shape.length) % shape.length));
  const order = shape.map((_, d) => d).filter((d) => shape[d] > 1).sort((a, b) => strides[a] - strides[b] || shape[a] - shape[b]);
  if (!order.length || reduced.has(order[0])) return 0;
  let row = 1;
  while (order.length && !reduced.has(order[0]) && strides[order[0]] === row) row *= shape[order.shift()];
  const inputs = product([...reduced].map((d) => shape[d])), outputs = elements / inputs;
  const vector = [4, 2, 1].find((v) => row % v === 0 && order.every((d) => strides[d] % v === 0)), most = 512 / vector;
  const widest = Math.min(most, powerBelow(Math.floor(outputs / vector))), highest = Math.min(most, powerBelow(inputs));
  const height = Math.min(highest, Math.floor(most / Math.min(widest, 32))), width = Math.min(widest, Math.floor(most / height));
  const values = Math.ceil(inputs / height), grid = Math.ceil(Math.ceil(outputs / vector) / width);
  const target = card.count * Math.floor(card.threads / (width * height));
  if (values < 256 || grid > target) return 0;
  const blocks = Math.max(Math.min(Math.ceil(target / grid), Math.ceil(values / 16)), Math.ceil(values / 256));
  return blocks > 1 ? stateBytes(tensor) * outputs * blocks * width * vector : 0;
}
const stateBytes = ({ dtype, item }) => dtype.includes("int") || dtype === "bool" ? 8 : Math.max(4, item);
// Another reduction: `item` bytes of state for each result, or those of an element, at least `least`; `at`: where its dimensions are.
const reduction = ({ item = 0, at = 1, least = 0 }) => (args, card) => {
  const dims = typeof args[at] === "number" ? [args[at]] : args[at];
  return Math.floor(partialSums([args[0], dims], card) / stateBytes(args[0])) * (item || Math.max(least, args[0].item));
};
function sum([tensor, dims], card, dtype = "int64") {
  const isCopied = !/^(float|bfloat|complex)/.test(tensor.dtype) && tensor.dtype !== dtype;
  return (isCopied ? tensor.elements * itemBytes(dtype) : 0) + partialSums([tensor, dims], card);
}
function biasGradient(args, card) {
  const grad = args[0], mask = args.at(-1);
  return Array.isArray(mask) && mask.at(-1) === true ? partialSums([grad, grad.shape.map((_, d) => d).filter((d) => d !== 1)], card) : 0;
}
function sorted([tensor, dim = -1]) {
  const at = dim < 0 ? dim + tensor.shape.length : dim, length = tensor.shape[at], { elements, item } = tensor;
  if (length <= 4096) return 8 * length;
  const rows = elements / length, each = rows > 1 && rows < 128 ? 24 + 2 * item : 16 + item;
  return elements * (each + (tensor.strides[at] === 1 ? 0 : 8 + 2 * item)) + Math.floor(elements / 5);
}
function added([target, indices, values, accumulates]) {
  if (!accumulates) return 0;
  const tensors = indices.filter((index) => index), first = indices.findIndex((index) => index), dims = Math.max(...tensors.map((i) => i.shape.length));
  const padded = tensors.map(({ shape }) => [...Array(dims - shape.length).fill(1), ...shape]);
  const count = product(Array.from({ length: dims }, (_, d) => Math.max(...padded.map((shape) => shape[d]))));
  const written = count * product([...target.shape.slice(0, first), ...target.shape.slice(first + tensors.length)]);
  return 48 * count + Math.floor(count / 4) + (values.elements < written || copyBytes(values) ? written * target.item : 0);
}
function embedding([grad, indices, weights, , isScaled]) {
  const count = indices.elements, { item } = indices, copy = copyBytes(grad), segments = Math.min(count, weights);
  if (count <= 3072 && !isScaled) return 0;
  const partial = Math.floor(count / 10) + segments, row = grad.shape.at(-1) * Math.max(4, grad.item);
  return { beside: (3 * count + 2 * segments + partial) * item + partial * row + copy, alone: 5 * count * item + Math.floor(count / 4) + copy };
}
// Into how many parts the flash kernel splits the keys on a card that runs so many blocks together.
function keyParts(blocks, keyBlocks, together) {
  if (!blocks || blocks >= 0.8 * together) return 1;
  const busy = [];
  for (let n = 1; n <= Math.min(128, together, keyBlocks); n++) {
    if (n > 1 && Math.ceil(keyBlocks / n) === Math.ceil(keyBlocks / (n - 1))) continue;
    const wave = blocks * n / together;
    busy.push([n, wave / Math.ceil(wave)]);
  }
  const best = Math.max(...busy.map(([, share]) => share));
  return busy.find(([, share]) => share >= 0.85 * best)?.[0] ?? 1;
}
function splitAttention([q, k, , dropout = 0]) {
  if (dropout > 0) return 0;
  const [batch, heads, queries, width] = q.shape, keys = Math.ceil(k.shape[2] / (width <= 64 ? 256 : width <= 128 ? 128 : 64));
  const blocks = batch * heads * Math.ceil(queries / 64);
  let parts = 1;
  for (let n = 16; n < 193; n += 4) parts = Math.max(parts, keyParts(blocks, keys, 2 * n));
  return parts > 1 ? 4 * parts * batch * heads * queries * (upTo(width, width <= 128 ? 32 : 64) + 1) : 0;
}
function flashBackward([, q]) {
  const [batch, heads, queries, width] = q.shape;
  return 4 * batch * heads * upTo(queries, 128) * (upTo(width, width <= 128 ? 32 : 64) + 1);
}
function efficientBackward([, q, k, v]) {
  const [batch, heads, queries, width] = q.shape, columns = Math.max(upTo(width, 128), upTo(v.shape[3], 128));
  return 4 * batch * heads * ((upTo(queries, 128) + 2 * upTo(k.shape[2], 128)) * columns + queries);
}
const same = (names, kernel) => Object.fromEntries(names.split(" ").map((name) => [name, kernel]));
const KERNELS = {
  ...same("var std var_mean std_mean max min argmax argmin", reduction({ item: 16 })), ...same("amax amin", reduction({})),
  ...same("any all", reduction({ item: 1 })), ...same("norm linalg_vector_norm", reduction({ at: 2, least: 4 })), prod: reduction({ least: 4 }),
  sum, mean: sum, convolution_backward: biasGradient, sort: sorted, index_put: added, embedding_dense_backward: embedding,
  _scaled_dot_product_flash_attention: splitAttention, _scaled_dot_product_flash_attention_backward: flashBackward,
  _scaled_dot_product_efficient_attention_backward: efficientBackward,
};

// -- a step ------------------------------------------------------------------------------------------------
const unpacked = new WeakMap();
async function unpack(entry) {
  if (!unpacked.has(entry)) {
    const bytes = Uint8Array.from(atob(entry.data), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const found = await new Response(stream).json();
    for (const step of found.steps) readTokens(step);
    unpacked.set(entry, found);
  }
  return unpacked.get(entry);
}
function readTokens(step) {
  const alive = step.categories.map(() => []), kinds = [];
  step.events = step.tokens.map((token) => {
    if (token >= 0) {
      alive[step.kinds[token][CATEGORY]].push(kinds.length);
      return kinds.push(step.kinds[token]) - 1;
    }
    const own = alive[(-1 - token) % 8], younger = (-1 - token) >> 3;
    return -1 - own.splice(own.length - 1 - younger, 1)[0];
  });
  step.kindOf = kinds;
}
// What a number of the file is at a batch and a length: itself, or a polynomial of them.
function value(found, at) {
  if (typeof found === "number") return found;
  const { of, multiple = 1 } = found, degrees = at.degrees, second = Math.ceil(at.second / multiple) * multiple;
  return Math.round(of.reduce((sum, c, i) => sum + c * second ** (i % degrees) * (i < degrees ? 1 : at.batch), 0));
}
// The arguments of an operator at a batch and a length.
function filled(tree, at) {
  if (Array.isArray(tree)) return tree.map((part) => filled(part, at));
  if (tree?.of) return value(tree, at);
  if (!tree?.t) return tree;
  const [shape, strides, dtype] = filled(tree.t, at);
  return { shape, strides, dtype, elements: product(shape), item: itemBytes(dtype) };
}
// Bytes of each number of the step's table: of an allocation, inside a kernel, or a bound of that.
function bytesAt(step, at, device) {
  return step.sizes.map((found) => {
    if (found === -1) return device.blas;
    if (!found.kernel && found.beside === undefined) return value(found, at);
    let { beside, alone = 0, least = 0, outputs = [] } = found;
    if (found.kernel) {
      const [args, dtype] = filled(found.arguments, at), inside = KERNELS[found.kernel](args, device.multiprocessors, dtype);
      ({ beside = inside, alone = 0 } = inside);
    }
    const made = outputs.reduce((sum, size) => sum + Math.ceil(value(size, at) / 512) * 512, 0);
    const bytes = Math.max(value(beside, at), value(alone, at) - made);
    return bytes <= least ? 0 : bytes;
  });
}
function sizesAt(step, table) {
  const rounded = table.map((bytes) => Math.ceil(bytes / 512) * 512);
  return Float64Array.from(step.kindOf, (kind) => rounded[kind[0]]);
}
function levels(step, sizes) {
  let live = 0;
  return Float64Array.from(step.events, (event) => live += event >= 0 ? sizes[event] : -sizes[-1 - event]);
}
function peakOf(step, live) {
  const phases = {};
  let best = { bytes: -1 };
  for (const [phase, number, from, to] of step.spans) {
    let highest = from ? live[from - 1] : 0;
    for (let i = from; i < to; i++) {
      if (live[i] > best.bytes) best = { bytes: live[i], at: i, phase };
      if (live[i] > highest) highest = live[i];
    }
    if (phase !== "setup" || !number) phases[phase] = Math.max(phases[phase] ?? 0, highest);
  }
  return { ...best, phases };
}
// Highest level with the upper bound of a kernel's workspace, if one matters (memfit/cost/workspaces.py).
function withBounds(step, live, table, peak) {
  let high = 0;
  for (const [from, to, number] of step.bounds) {
    const bound = table[number];
    let level = 0;
    for (let i = from; i < to; i++) level = Math.max(level, live[i]);
    if (bound > 0) high = Math.max(high, level + bound);
  }
  return high > peak * 1.003 ? high : 0;
}

// -- the answer ----------------------------------------------------------------------------------------------
function entryOf(file, setting) {
  return file.models[setting.model].plans[`${setting.precision}/${setting.recomputation}/${setting.sharding}`];
}
// Why the page cannot answer: a key of its words, or "".
function refusal(file, setting) {
  const model = file.models[setting.model];
  if (!model) return "model";
  const entry = entryOf(file, setting), { batch, second } = setting;
  if ([batch, ...(model.second ? [second] : [])].some((n) => !Number.isInteger(n) || n < 1)) return "number";
  if (!entry || entry.problem) return "combination";
  if (batch > model.batches.at(-1)) return "batch";
  if (model.second) {
    if (second < model.seconds[0] || second > model.seconds.at(-1)) return "second";
    if (second % model.multiple) return "multiple";
  }
  return file.devices[setting.device]?.beside[entry.groups] ? "" : "device";
}
async function answer(file, setting, whole = true) {
  const run = refusal(file, setting);
  if (run) return { run };
  const model = file.models[setting.model], entry = entryOf(file, setting), device = file.devices[setting.device];
  const found = await unpack(entry), { batch } = setting, second = model.second ? setting.second : 1;
  const step = found.steps.find((s) => batch >= s.batches[0] && batch <= s.batches[1]);
  const table = bytesAt(step, { batch, second, degrees: model.seconds.length }, device);
  const sizes = sizesAt(step, table), live = levels(step, sizes);
  const peak = peakOf(step, live), bytes = peak.bytes;
  const bounded = withBounds(step, live, table, bytes);
  const allocated = [bytes, bytes * (1 - 0.01) * step.ratio[0], Math.max(bytes * (1 + 0.01) * step.ratio[1], bounded)];
  const events = step.events.filter((event) => sizes[event >= 0 ? event : -1 - event] > 0);
  const streams = step.kindOf.map((kind) => kind[STREAM]);
  const { reserved: plain, counted } = allocatorPeaks(events, sizes, streams);
  const peaks = [plain, ...file.late.map((by) => allocatorPeaks(delayed(events, by, file.random), sizes, streams).reserved)];
  const reserved = [plain, Math.min(plain, allocated[1]), Math.max(...peaks) * (allocated[2] / bytes)];
  allocated[0] = Math.max(bytes, counted); // as torch's counter has it: with the rests of cached blocks
  allocated[2] = Math.max(allocated[2], allocated[0] * (1 + 0.01));
  const needed = reserved.map((n, i) => n + device.beside[entry.groups][i]);
  const figures = { allocated, reserved, device: needed, memory: device.memory, fits: Math.floor(needed[2]) <= device.memory };
  return whole ? { ...figures, peak, bounded: bounded > 0, ...holders(step, sizes, found.parts, peak.at), line: timeline(step, sizes, live) } : figures;
}
// What is alive at the peak, by category and by module and operator, the largest first.
function holders(step, sizes, parts, at) {
  const alive = new Set(), categories = {}, groups = new Map();
  for (let i = 0; i <= at; i++) step.events[i] >= 0 ? alive.add(step.events[i]) : alive.delete(-1 - step.events[i]);
  for (const index of alive) {
    const kind = step.kindOf[index], category = step.categories[kind[CATEGORY]], key = `${category}\t${parts[kind[PART]]}`;
    categories[category] = (categories[category] ?? 0) + sizes[index];
    const sum = groups.get(key) ?? { category, part: parts[kind[PART]], bytes: 0, count: 0 };
    sum.bytes += sizes[index]; sum.count += 1;
    groups.set(key, sum);
  }
  return { categories, holders: [...groups.values()].sort((a, b) => b.bytes - a.bytes) };
}
// The last step: at most 360 instants, each the highest of its stretch, with the bytes of each category.
function timeline(step, sizes, live) {
  const own = step.spans.filter(([phase]) => phase !== "setup"), last = own.at(-1)[1];
  const spans = own.filter(([, number]) => number === last);
  const from = spans[0][2], to = spans.at(-1)[3], width = Math.max(1, (to - from) / 360);
  const now = step.categories.map(() => 0), points = [];
  for (let i = 0; i < to; i++) {
    const event = step.events[i], index = event >= 0 ? event : -1 - event;
    now[step.kindOf[index][CATEGORY]] += event >= 0 ? sizes[index] : -sizes[index];
    const bucket = Math.floor((i - from) / width);
    if (i >= from && !(live[i] <= points[bucket]?.total)) points[bucket] = { total: live[i], bytes: [...now] };
  }
  const places = spans.map(([phase, , a, b]) => [phase, (a - from) / (to - from), (b - from) / (to - from)]);
  return { points: points.filter(Boolean), spans: places, categories: step.categories };
}
// The largest batch of a device that fits: {value, next: whether the next larger one is known not to fit}.
async function largest(file, setting) {
  let answered = true;
  const fits = async (batch) => {
    const found = await answer(file, { ...setting, batch }, false);
    answered &&= !found.run;
    return found.fits;
  };
  let low = 0, high = file.models[setting.model].batches.at(-1) + 1;
  if (refusal(file, { ...setting, batch: 1 })) return null;
  while (high - low > 1) {
    const mid = low ? (low + high) >> 1 : Math.min(2, high - 1) === high - 1 ? 1 : (low + high) >> 1;
    if (await fits(mid)) low = mid; else high = mid;
  }
  return answered ? { value: low, next: high <= file.models[setting.model].batches.at(-1) } : null;
}
// The commands that give these figures exactly, as text for a shell.
function planText(file, setting) {
  const kinds = ["precision", "recomputation", "sharding"];
  const uses = Object.assign({}, ...kinds.map((kind) => file.choices[kind][setting[kind]]));
  const lines = Object.entries(uses).map(([name, knobs]) => `  ${name}: {${Object.entries(knobs).map(([k, v]) => `${k}: ${v}`).join(", ")}}`);
  const techniques = lines.length ? `techniques:\n${lines.join("\n")}` : "techniques: {}";
  return `cat > plan.yaml <<'EOF'\n${techniques}\n${setting.sharding === "none" ? "" : `ranks: ${file.ranks}\n`}EOF\n`;
}
function command(file, setting, kind = "estimate", lang = "en") {
  const model = file.models[setting.model], ranks = setting.sharding === "none" ? 1 : file.ranks;
  const isPlain = setting.precision === "float32" && setting.recomputation === "none" && ranks === 1;
  const plan = kind === "estimate" && isPlain ? "" : planText(file, setting); // --largest without a plan searches
  const words = ["memfit", kind === "estimate" ? "estimate" : "plan", model.spec];
  if (kind === "estimate" && plan) words.push("plan.yaml");
  if (model.size) words.push("--size", model.size);
  if (kind === "estimate") words.push("--batch", setting.batch * ranks);
  if (model.second) words.push(...(model.second === "length" ? ["--length", setting.second] : ["--dim", `${model.second}=${setting.second}`]));
  if (kind === "largest") words.push("--largest", "batch");
  words.push("--on", ranks > 1 ? `${ranks}x${setting.device}` : setting.device);
  if (kind === "largest") words.push("--plan", "plan.yaml");
  else if (lang !== "en") words.push("--lang", lang); // the answer to --largest is in English
  return plan + words.join(" ");
}

if (typeof module !== "undefined") module.exports = { answer, largest, command, refusal, shifts, filled, KERNELS };
