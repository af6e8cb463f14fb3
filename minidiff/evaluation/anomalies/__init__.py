"""Where does an image differ from what a model of normal images would have made of it?"""
