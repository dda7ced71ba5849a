"""`fastory serve`: a local page over a folder of run folders, and the HTTP API that it uses.

shelf.py has the folder, drawing.py the queue and the process that draws (worker.py), gate.py who may ask, api.py and pages.py
the routes, static/ the page. A story's state is its run folder's manifest; the server keeps its own notes in FOLDER/.fastory.
"""
