"""One scan from any file format to Hounsfield units on a canonical grid; used by packing and by inference."""
