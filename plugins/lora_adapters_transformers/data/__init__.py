"""The data side of `lora-adapters train` for text tasks: from files to token ids, with nothing about training in it.

`tables` reads rows, `templates` turns rows into texts, `encoding` turns texts into tokens and labels, `packing` joins
rows, `preview` shows what is learnt from one, `rouge` scores what was written.
"""
