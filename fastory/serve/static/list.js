// All stories: a picture, a name, a state, and what can be done with each.

import { get, listen, pictureAddress, send } from "./api.js";
import { button, element } from "./element.js";
import { attempt, say } from "./say.js";

export const STATES = { draft: "Draft", queued: "In the queue", drawing: "Drawing", paused: "Paused", finished: "Finished" };

export const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function sizeOf(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

function thumbnail(story) {
  if (!story.newest) return element("span", {}, [story.state === "draft" ? "Not drawn yet" : "No picture yet"]);
  const [round, frame, version] = story.newest;
  return element("img", { src: pictureAddress(story.id, frame, round, version), alt: "", loading: "lazy" });
}

async function rename(story) {
  const name = prompt("Name in the list", story.name);
  if (name?.trim()) await send("PATCH", `/stories/${story.id}`, { name });
}

async function remove(story) {
  await send("DELETE", `/stories/${story.id}`);
  say(`${story.name} is in the trash folder (.fastory/trash).`);
}

async function duplicate(story) {
  const { id } = await send("POST", `/stories/${story.id}/duplicate`);
  location.hash = `#/${id}`;
}

function card(story, refresh) {
  const address = `#/${story.id}`;
  const act = (text, action) => button(text, async () => (await attempt(() => action(story)), refresh()), { className: "bare" });
  return element("li", { className: "story card" }, [
    element("a", { className: "thumb", href: address, tabIndex: -1, "aria-hidden": "true" }, [thumbnail(story)]),
    element("div", { className: "about" }, [
      element("a", { href: address, className: "text" }, [story.name]),
      element("p", { className: "quiet" }, [`${counted(story.frames, "frame")}, ${sizeOf(story.disk_bytes)}`]),
      element("span", { className: "state", dataset: { state: story.state } }, [STATES[story.state]]),
      story.error ? element("p", { className: "note bad text" }, [story.error]) : null,
    ]),
    element("div", { className: "row" }, [act("Rename", rename), act("Duplicate", duplicate), act("Delete", remove)]),
  ]);
}

export async function createStory(story = { title: "", frames: [""] }) {
  const { id } = await send("POST", "/stories", { story });
  location.hash = `#/${id}`;
}

export async function showList(main) {
  document.title = "Stories · fastory";
  const list = element("ul", { className: "stories" });
  const none = element("p", { className: "empty", hidden: true }, ["No story yet. Write the first: a caption a picture."]);
  const refresh = async () => {
    const stories = await get("/stories");
    list.replaceChildren(...stories.map((story) => card(story, refresh)));
    none.hidden = stories.length > 0;
  };
  await refresh();
  const create = button("New story", () => attempt(createStory), { className: "main" });
  main.replaceChildren(element("div", { className: "row spread" }, [element("h1", {}, ["Stories"]), create]), list, none);
  return listen("", (event) => {
    if (["StateChanged", "Deleted", "RoundFinished"].includes(event.event)) refresh().catch(() => {});
  });
}
