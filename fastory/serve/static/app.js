// Which view is shown: #/ is the list, #/ID a story, written or drawn as its state says.

import { get, listen } from "./api.js";
import { element } from "./element.js";
import { showList } from "./list.js";
import { showRun } from "./run.js";
import { showDraft } from "./write.js";

const main = document.getElementById("main");
let leave = () => {};

async function show() {
  leave();
  leave = () => {};
  const story = decodeURIComponent(location.hash.replace(/^#\/?/, ""));
  try {
    leave = story ? await showStory(story) : await showList(main);
  } catch (error) {
    main.replaceChildren(element("p", { className: "empty" }, [error.message]));
  }
}

/** A draft becomes a run when it is queued, and the view with it. */
async function showStory(name) {
  let left = () => {};
  let written = null;
  const turn = async () => {
    const story = await get(`/stories/${encodeURIComponent(name)}`);
    const isDraft = story.state === "draft";
    if (isDraft === written) return;
    written = isDraft;
    left();
    left = await (isDraft ? showDraft(main, story) : showRun(main, story));
    document.title = `${story.name} · fastory`;
  };
  await turn();
  const end = listen(name, (event) => {
    if (event.event === "StateChanged") turn().catch(() => {});
    if (event.event === "Deleted") location.hash = "#/";
  });
  return () => (left(), end());
}

addEventListener("hashchange", show);
show();
