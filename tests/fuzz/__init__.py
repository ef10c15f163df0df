"""Fuzzing: damaged and hostile inputs of every format, each read in a process that is watched.

python -m tests.fuzz --minutes 20 --formats npz,pt --seed 7     all formats without --formats
python -m tests.fuzz --replay FOLDER                            one stored input again

mutate.py       bytes, JSON and words that are changed at random
containers.py   the same inside safetensors files, zip archives and pickles
seeds.py        sound files of every format, which the tests make themselves
formats.py      per format: its seeds, how they are changed, and what reads them
uses.py         reading a file as a user would, and comparing with an independent reader
worker.py       the process that reads, with limits on memory and time and without programs to start
report.py       the table of figures and the folder of inputs that failed
engine.cpp      the C API of the engine under sanitizers
"""
