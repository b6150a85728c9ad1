"""How a sweep is read: its results, honest statistics, figures, a table for the terminal and a page for the browser."""
