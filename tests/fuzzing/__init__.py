"""Files that are damaged on purpose, thousands of them: each is read as the command line would, in a bounded process.

`seeds` makes sound files, `mutations` changes what is in them, `drives` does with them what commands do, and `child`
runs many cases in one process with a limit of memory and of time. Inputs that were found lie in `found/`.
"""
