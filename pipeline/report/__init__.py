"""Reports of runs: one self-contained HTML page, charts, and the comparison of runs.

stage       `report`: run folder + cache -> eval/features.json and report.html
features    which latents to show and their contexts (survey: the pass over the rows; examples: the records)
page        the page, from the run folder alone (scores, contexts, charts: its parts; page.html, .css, .js)
"""
