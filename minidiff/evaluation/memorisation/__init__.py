"""Are samples copies of training images, and which of them may leave?"""
