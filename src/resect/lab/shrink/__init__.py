"""`resect shrink`, step by step: what is wished for, choosing, cutting, recovering, what came of it, the report."""
