// Where pictures are dropped, or chosen.

import { upload } from "./api.js";
import { button, element } from "./element.js";
import { attempt } from "./say.js";

/** path: of the story; names: of pictures that are there; `taken` gets the names under which the dropped ones were kept. */
export function dropZone(path, { names, alt, label, many, taken }) {
  const take = (list) => attempt(async () => {
    const uploaded = [];
    for (const file of many ? list : [...list].slice(0, 1)) uploaded.push((await upload(`${path}/pictures`, file)).name);
    if (uploaded.length) await taken(uploaded);
  });
  const chosen = element("input", { type: "file", accept: "image/*", multiple: many, hidden: true, onchange: () => take(chosen.files) });
  const pictures = names.map((name) => element("img", { src: `${path}/${name}`, alt }));
  const zone = element("div", { className: "drop" }, [...pictures, button(label, () => chosen.click()), element("span", { className: "quiet" }, ["or drop here"]), chosen]);
  zone.addEventListener("dragover", (event) => (event.preventDefault(), zone.classList.add("over")));
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => (event.preventDefault(), zone.classList.remove("over"), take(event.dataTransfer.files)));
  return zone;
}
