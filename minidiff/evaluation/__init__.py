"""Are the images like real ones, as asked for, and new? In the order in which numbers pass through.

    sets       what every command begins with: real and synthetic sets, what is refused, the judge
    features   images → feature vectors, and their cache
    metrics    sets of features → numbers
    verdicts   numbers → words: yes, no, gain, harm, not resolved
    pages      templates, tables and charts of the pages
    matrix     real subsets × synthetic sets, between controls that must be caught
    readers    a blinded study with doctors

Beside them a file a command: fid, monitor, uncertainty, verify, audit, cards.
"""
