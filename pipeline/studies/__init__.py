"""Questions asked of many dictionaries at once: each a list of trainings, the figures of each, a table and a plot.

coefficients    what weight of which penalty: L1, Johnson-Lindenstrauss, both
activations     which activation function, as they come or at one L0
rates           how fast the decoder learns beside the encoder
layers          how dictionaries differ from layer to layer
alignment       what pulling dictionaries of several seeds towards each other buys

A study is a composition of stages (`study`): open the runs, train what is not finished, judge what is not judged
(`figures`), collect. Runs are named by their settings, so whatever was done is taken up, by another study as well.
"""
