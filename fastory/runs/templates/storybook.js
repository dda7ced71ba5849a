
"use strict";
(() => {
  const rounds = JSON.parse(document.getElementById("rounds").textContent);
  const last = rounds.length - 1;
  const dialog = document.querySelector("dialog");
  const stage = dialog.querySelector(".stage");
  const sliders = [...document.querySelectorAll(".rounds input")];

  // A frame's pictures by the slider's position; null where the frame was left out. The final one comes last.
  const frames = [...document.querySelectorAll("figure")].map((figure) => {
    const image = figure.querySelector("img");
    image.style.aspectRatio = `${image.width} / ${image.height}`;
    const earlier = JSON.parse(figure.querySelector("script").textContent);
    return { figure, image, caption: image.alt, pictures: [...earlier, image.getAttribute("src")] };
  });

  let position = last;
  let enlarged = -1;

  const roundLabel = () => `Round ${rounds[position]} of ${rounds[last]}`;

  function put(image, holder, frame) {
    const picture = frame.pictures[position];
    const missing = picture === null;
    if (!missing && image.getAttribute("src") !== picture) image.src = picture;
    image.alt = missing ? "" : frame.caption;
    holder.classList.toggle("missing", missing);
    holder.querySelector(".absent").hidden = !missing;
  }

  function showEnlarged() {
    const frame = frames[enlarged];
    put(stage.querySelector("img"), stage, frame);
    dialog.querySelector(".caption").textContent = frame.caption;
    dialog.querySelector(".position").textContent = `Frame ${enlarged} (${enlarged + 1} of ${frames.length})`;
    dialog.querySelector(".previous").disabled = enlarged === 0;
    dialog.querySelector(".next").disabled = enlarged === frames.length - 1;
  }

  function goToRound(next) {
    position = Math.min(last, Math.max(0, next));
    for (const slider of sliders) {
      slider.value = position;
      slider.setAttribute("aria-valuetext", roundLabel());
      slider.nextElementSibling.textContent = roundLabel();
    }
    for (const frame of frames) put(frame.image, frame.figure, frame);
    if (dialog.open) showEnlarged();
  }

  function goToFrame(next) {
    enlarged = Math.min(frames.length - 1, Math.max(0, next));
    showEnlarged();
  }

  frames.forEach((frame, index) => {
    const button = frame.figure.querySelector("button");
    button.disabled = false;
    button.addEventListener("click", () => {
      goToFrame(index);
      dialog.showModal();
    });
  });
  for (const slider of sliders) slider.addEventListener("input", () => goToRound(Number(slider.value)));

  dialog.querySelector(".previous").addEventListener("click", () => goToFrame(enlarged - 1));
  dialog.querySelector(".next").addEventListener("click", () => goToFrame(enlarged + 1));
  dialog.querySelector(".close").addEventListener("click", () => dialog.close());
  stage.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => frames[enlarged].figure.querySelector("button").focus());
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("input")) return; // the slider has the arrow keys itself
    const actions = {
      ArrowLeft: () => goToFrame(enlarged - 1),
      ArrowRight: () => goToFrame(enlarged + 1),
      ArrowUp: () => goToRound(position + 1),
      ArrowDown: () => goToRound(position - 1),
    };
    if (!(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  });

  document.documentElement.classList.add("scripted");
  for (const bar of document.querySelectorAll("body > .rounds")) bar.hidden = false;
  goToRound(last);
})();
