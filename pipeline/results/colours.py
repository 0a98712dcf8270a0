"""Every colour of samfed's pages and figures but the classes', which ``palette`` has."""

from __future__ import annotations

# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dashed", "dotted")  # the same words in matplotlib and in CSS
TRUTH = (255, 255, 255, 255)  # of the true outline
GREY = "#B8BEC6"
SOURCES = {"both agree": "#C9D1DA", "from SAM": "#0072B2", "from the client": "#E69F00"}

SPINE, LABEL, GRID = "#8A939E", "#4A5360", "#E6E9ED"  # of a figure's axes
HEAT = "viridis"  # matplotlib's map of weights
HEAT_STOPS = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")  # the same in CSS

#: Variables of a page's style; text has a contrast of 4.5 or more to what it stands on (WCAG AA).
LIGHT = {
    "ink": "#1b2430", "soft": "#566170", "line": "#dfe3e8", "accent": "#0072b2",
    "page": "#ffffff", "shade": "#f3f5f8", "warn": "#fff4e0", "warn-line": "#d98a00",
}  # fmt: skip
DARK = {
    "ink": "#e8ecf1", "soft": "#a7b1be", "line": "#343d49", "accent": "#5cb8ee",
    "page": "#12171d", "shade": "#1c232c", "warn": "#332708", "warn-line": "#e0a030",
}  # fmt: skip
