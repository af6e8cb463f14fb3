"""Are the images like real ones, as asked for, and new? Rooms in the order in which numbers pass
through them.

    extractors     images → feature vectors                 metrics       sets of features → numbers
    memorisation   copies, membership, what may leave       matrix        real × synthetic × controls that must be caught
    report         one page on one set of samples           history       checkpoints over time, all verified by hashes
    readers        a blinded study with doctors             documents     a data set's audit page, model card and datasheet
    study          the page of the classifier study
"""
