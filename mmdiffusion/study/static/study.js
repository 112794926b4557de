"use strict";
const film = document.getElementById("film");
const alertLine = document.getElementById("alert");
// A page that replaces another leaves the focus nowhere; a screen reader goes on from the heading or from the fault.
(alertLine && !alertLine.hidden ? alertLine : document.querySelector("h1")).focus();

if (film) {
  const play = document.getElementById("play");
  const form = document.querySelector("form");
  let isPlayed = false;
  play.hidden = false;
  play.addEventListener("click", () => { film.currentTime = 0; film.play(); });
  film.addEventListener("play", () => { isPlayed = true; play.textContent = "Play it again"; });
  film.addEventListener("error", () => say("This film cannot be played here. Please load the page again."));

  // Digits answer the question that has the focus, and go on to the next one; arrows are the browser's.
  for (const fieldset of form.querySelectorAll("fieldset")) {
    fieldset.addEventListener("keydown", (event) => {
      const radio = fieldset.querySelector(`input[value="${CSS.escape(event.key)}"]`);
      if (!radio || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      radio.checked = true;
      const next = fieldset.nextElementSibling;
      (next.querySelector("input:checked") || next.querySelector("input") || next).focus();
    });
  }

  form.addEventListener("submit", (event) => {
    if (isPlayed) {
      form.querySelector("button").disabled = true;
    } else {
      event.preventDefault();
      say("Please play the film first.");
    }
  });
}

function say(text) {
  alertLine.textContent = text;
  alertLine.hidden = false;
  alertLine.focus();
}
