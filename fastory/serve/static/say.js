// One line at the foot of the page: what happened, what was refused, what can be undone.

import { button, element } from "./element.js";

let timer = 0;

/** Show a text for some seconds; undo: what a button beside it does. */
export function say(text, undo) {
  const line = element("div", {}, [element("span", { className: "text" }, [text])]);
  const said = document.getElementById("said");
  const gone = () => said.replaceChildren();
  if (undo) line.append(button("Undo", () => (undo(), gone())));
  const dialog = document.querySelector("dialog[open]");
  (dialog ?? document.body).append(said);
  said.replaceChildren(line);
  clearTimeout(timer);
  timer = setTimeout(gone, 8000);
}

/** Do something; what the server refuses is shown. Returns whether it was done. */
export async function attempt(action) {
  try {
    await action();
    return true;
  } catch (error) {
    say(error.message);
    return false;
  }
}
