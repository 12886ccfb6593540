"use strict";
// Draws each chart from the JSON beside it. Expressions are interpreted (ast), never compiled.
for (const plot of document.querySelectorAll(".plot")) {
  const spec = JSON.parse(plot.nextElementSibling.textContent);
  const options = { mode: "vega-lite", renderer: "svg", ast: true, actions: false, tooltip: false };
  options.logLevel = vega.Error;
  vegaEmbed(plot, spec, options)
    .then(() => plot.classList.add("drawn"))
    .catch((error) => {
      plot.textContent = `This chart cannot be drawn (${error}). The table has its numbers.`;
    });
}
// On paper, everything is open.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const part of closed) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of closed) part.open = false;
});
