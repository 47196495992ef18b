"""One self-contained HTML page per build, and one that shows two builds side by side."""
