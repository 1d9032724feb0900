function draw(figure) {
  if (figure.dataset.drawn) return;
  figure.dataset.drawn = "yes";
  const { data, layout } = JSON.parse(document.getElementById(figure.id + "-data").textContent);
  Plotly.newPlot(figure, data, layout, { displaylogo: false, displayModeBar: false });
}
function visible(element) {
  return element.getClientRects().length > 0;
}
function drawAll() {
  for (const figure of document.querySelectorAll(".figure")) if (visible(figure)) draw(figure);
}
for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", drawAll);
drawAll();
