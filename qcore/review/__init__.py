"""The review: what was measured and decided about one or more candidates, as a page, as Markdown and as JSON."""
