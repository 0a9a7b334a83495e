"""Words and pictures: pure functions from stored rows to one self-contained HTML file (`aivmm.reports.render`) or Markdown."""
