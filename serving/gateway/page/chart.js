// Small charts of the last minute, as SVG that stretches: 600 x 100 units, one pixel of the screen for a line.

const WIDTH = 600, HEIGHT = 100, SECONDS = 60;
const SVG = "http://www.w3.org/2000/svg";

const x = (sample, now) => WIDTH * (1 - (now - sample.at) / SECONDS);
const y = (value, top) => HEIGHT * (1 - value / top);

function path(svg, kind, d, depth) {
  const made = document.createElementNS(SVG, "path");
  made.setAttribute("class", kind);
  made.setAttribute("d", d);
  if (depth !== undefined) made.style.setProperty("--depth", depth);
  svg.append(made);
}

// The first of 1, 2, 5, 10, 20 ... that holds what is shown, so that the scale seldom changes.
export function ceiling(values, least) {
  const most = Math.max(least, ...values);
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 5, 10].map((n) => n * power).find((n) => n * 1.04 >= most);
}

// samples: [{at, bands: Map(depth -> value)}]; the shallowest lies at the bottom. Returns the top of the scale.
export function stack(svg, samples, depths, shade, now) {
  svg.replaceChildren();
  const sums = samples.map(() => 0);
  const top = ceiling(samples.map((s) => [...s.bands.values()].reduce((a, b) => a + b, 0)), 1);
  for (const depth of depths) {
    const under = [...sums];
    samples.forEach((s, i) => { sums[i] += s.bands.get(depth) ?? 0; });
    if (samples.length < 2 || sums.every((sum, i) => sum === under[i])) continue;
    const points = (values) => samples.map((s, i) => `${x(s, now).toFixed(1)} ${y(values[i], top).toFixed(2)}`);
    const d = `M${points(sums).join("L")}L${points(under).reverse().join("L")}Z`;
    path(svg, depth === 0 ? "area entry" : "area", d, shade(depth));
  }
  return top;
}

// curves: [{kind, of: sample -> value or null}]; the first one has its area filled. Likewise.
export function lines(svg, samples, curves, least, now) {
  svg.replaceChildren();
  const top = ceiling(samples.flatMap((s) => curves.map((c) => c.of(s) ?? 0)), least);
  for (const [number, curve] of curves.entries()) {
    let d = "", run = [];
    const close = () => {
      if (run.length && number === 0 && run.length > 1) {
        path(svg, "under", `M${run[0][0]} ${HEIGHT}L${run.map((p) => p.join(" ")).join("L")}L${run.at(-1)[0]} ${HEIGHT}Z`);
      }
      if (run.length) d += `M${run.map((p) => p.join(" ")).join("L")}`;
      run = [];
    };
    for (const s of samples) {
      const value = curve.of(s);
      if (value === null) close();
      else run.push([x(s, now).toFixed(1), y(value, top).toFixed(2)]);
    }
    close();
    path(svg, `curve ${curve.kind}`, d);
  }
  return top;
}

// counts: [[bound or null, cumulative count]]; as if the values of a bucket were spread evenly over it.
export function quantile(counts, share) {
  const total = counts.length ? counts.at(-1)[1] : 0;
  if (total <= 0) return null;
  let low = 0, below = 0;
  for (const [bound, upto] of counts) {
    if (upto >= share * total) {
      return bound === null ? low : low + (bound - low) * (share * total - below) / (upto - below || 1);
    }
    [low, below] = [bound, upto];
  }
  return low;
}
