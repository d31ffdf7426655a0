// Draws the charts, again when the page turns dark or an axis logarithmic. In a block: Vega's names are global.
{
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const looks = JSON.parse(document.getElementById("looks").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  const draw = (figure) => {
    const spec = structuredClone(charts[figure.dataset.chart]);
    for (const box of figure.querySelectorAll("input")) {
      for (const {encoding} of spec.layer) {
        if (encoding[box.name] !== undefined) {
          encoding[box.name].scale = box.checked ? {type: "log", nice: false} : {nice: false, zero: false};
        }
      }
      if (box.checked) {
        spec.transform = [...(spec.transform ?? []), {filter: `datum.${box.value} > 0`}];
      }
    }
    const config = structuredClone(looks[dark.matches ? "dark" : "light"]);
    config.legend.columns = Math.max(1, Math.floor(figure.clientWidth / 130));
    const actions = {export: true, source: false, compiled: false, editor: false};
    const name = figure.dataset.chart;
    const tooltip = {theme: dark.matches ? "dark" : "light"};
    const options = {config, actions, tooltip, renderer: "svg", downloadFileName: name};
    return vegaEmbed(figure.querySelector("div"), spec, options);
  };
  const figures = [...document.querySelectorAll("figure")];
  figures.forEach((figure) => {
    draw(figure);
    figure.addEventListener("change", () => draw(figure));
  });
  dark.addEventListener("change", () => figures.forEach(draw));
}
