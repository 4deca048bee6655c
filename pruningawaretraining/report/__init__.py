"""Results of a run: tables for the terminal (:mod:`summary`, :mod:`tables`) and the HTML report (:mod:`html`).

``Report`` is imported here because the pruner returns it; the HTML side, with matplotlib and jinja2, is imported only
by those who ask for it: ``from pruningawaretraining.report.html import write_report``.
"""

from pruningawaretraining.report.summary import Report

__all__ = ["Report"]
