"""Report of one run, or of several side by side, as one self-contained HTML page.

    read_run.py  content of a run directory at this moment
    page.py      the page, made of its sections: summary, curves, settings, samples
    charts.py    curves as inline SVG

Promises: the page loads nothing and runs no script (its content security policy forbids both); every
text that comes from a run is escaped, since samples may hold anything; a run that is active, has failed
or was copied from elsewhere gives a page too; nothing in the run directory is changed but the report.
"""
