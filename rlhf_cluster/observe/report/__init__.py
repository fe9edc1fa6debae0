"""A run, or several beside each other, as one HTML page that needs nothing else.

    read_run.py  what a run directory has at this moment
    charts.py    curves as inline SVG
    page.py      the page

Promises: the page loads nothing and runs no script (its content security policy forbids both); every
text that comes from a run is escaped, since samples may hold anything; a run that is going, has failed
or was copied from elsewhere gives a page too; nothing in the run directory is changed but the report.
"""
