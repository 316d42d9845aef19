"""A run to look at: what its latents fire on, and one self-contained HTML page.

stage       `report`: run folder + cache -> eval/features.json and report.html
features    which latents to show and their contexts (survey: the pass over the rows; examples: the records)
page        the page, from the run folder alone (scores, contexts, charts: its parts; page.html, .css, .js)
"""
