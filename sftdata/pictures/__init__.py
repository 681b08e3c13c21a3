"""Pictures of vision-language rows, prepared without a pixel: only sizes decide which tokens stand for one.

Read in the order of the data:

rows.py        a row -> its messages with a part for each picture, and a reference for each part
references.py  a reference -> the bytes of its file
headers.py     bytes -> format, height and width as every processor turns the picture
loaded.py      a reference -> the picture as a set keeps it
families.py    a processor's JSON -> the family, and its rule
layouts.py     height and width -> the text that stands for the picture, and how often its token repeats
stretch.py     ids of the compact text -> ids as the processor writes them
gate.py        the rule held against the family's own processor, in a process of its own (reference.py)
"""
