// Before the first paint, so that the page does not flash: the theme that was chosen here earlier, if any.
try {
  const theme = localStorage.getItem("theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {} // storage is off
